"""A daemon that is filled as far as its budgets go, and the most memory that all its processes had. Owns neither.

Memory is read from outside: the kernel's high-water marks of what each process has resident, so that no peak falls
between two looks, and what is shared with neighbours counts as if there were none. Experts come as after a warm
restart, every one of them where there is room, since it is a matter of traffic who else would ever be asked for.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from expertd_engine.bench.http_load import get, run_streams
from expertd_engine.bench.serve import running_daemon
from expertd_engine.errors import EngineError
from expertd_engine.experts.events import Remember
from expertd_engine.experts.store import ExpertStore
from expertd_engine.memory import peak_rss_bytes, process_tree
from expertd_engine.planning.profile import MemoryProfile
from expertd_engine.warm_restart import NAME, Kept

ANSWER = 12
"""Tokens that each stream says after its prompt."""
START_S = 600.0
_POLL_S = 0.1
_PATIENCE_S = 86400
"""All contexts full may take long, and the last of the streams wait for the first."""


@dataclass(frozen=True, slots=True)
class Filled:
    """Bytes: all processes at their peaks, and of these experts and KV blocks."""

    peak: int
    experts: int
    kv: int


def fill(
    store: ExpertStore, memory: MemoryProfile, flags: Mapping[str, int], kv_blocks: int, longest: int | None = None
) -> Filled:
    """Run a daemon with these flags beside `memory`'s limits, load experts up to its budget, and continue sequences of
    `longest` tokens (by default the model's), as many at once as may be and `kv_blocks` hold.

    Raises EngineError for a daemon that does not start, fill or answer.
    """
    tokens = min(memory.max_model_len, longest or memory.max_model_len)
    blocks_each = -(-tokens // memory.block_tokens)
    streams = max(1, min(memory.max_sequences, kv_blocks // blocks_each))
    vocabulary = msgspec.json.decode((store.path / "config.json").read_bytes())["vocab_size"]
    with _warm(store) as folder, running_daemon(_command(folder, memory, flags, kv_blocks), START_S) as (port, pid):
        experts = _fill_experts(port)
        run_streams(port, streams, tokens - ANSWER, ANSWER, vocabulary, 0)
        peak = sum(peak_rss_bytes(one) for one in process_tree(pid))
    return Filled(peak, experts, streams * blocks_each * memory.kv_block)


@contextmanager
def _warm(store: ExpertStore) -> Iterator[Path]:
    """The store under another name, as if all its experts had been in use when it was last served."""
    with tempfile.TemporaryDirectory(prefix="expertd-full-") as name:
        folder = Path(name)
        for file in store.path.iterdir():
            if file.name != NAME:
                (folder / file.name).symlink_to(file.resolve())
        kept = Kept(store.index.store_id, "", Remember((), tuple(store.experts())))
        (folder / NAME).write_bytes(msgspec.msgpack.encode(kept))
        yield folder


def _fill_experts(port: int) -> int:
    """Wait until no further expert fits; the bytes of those that are there."""
    until_s, resident = time.monotonic() + START_S, 0
    while time.monotonic() < until_s:
        experts = msgspec.json.decode(get(port, "/status")[1])["memory"]["experts"]
        resident = int(experts["resident"])
        if resident and experts["limit"] - resident < experts["minimum"]:  # two of the longest records
            return resident
        time.sleep(_POLL_S)
    raise EngineError(f"the daemon has loaded experts of {resident} bytes in {START_S:.0f} s, and fewer than fit")


def _command(folder: Path, memory: MemoryProfile, flags: Mapping[str, int], kv_blocks: int) -> Sequence[str]:
    limits = {
        "--kv-budget": kv_blocks * memory.kv_block,
        "--max-model-len": memory.max_model_len,
        "--max-sequences": memory.max_sequences,
        "--max-step-tokens": memory.max_step_tokens,
        "--max-queue-wait-s": _PATIENCE_S,
    }
    command = [sys.executable, "-m", "expertd_server", "serve", str(folder), "--port", "0"]
    return command + [part for flag, value in {**limits, **flags}.items() for part in (flag, str(value))]
