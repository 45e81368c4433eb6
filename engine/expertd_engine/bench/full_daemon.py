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
"""Tokens that streams say together, each after its prompt, at least."""
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
    """Run a daemon with these flags beside `memory`'s limits, load experts up to its budget, and continue as many
    sequences at once as may be, one of them of `longest` tokens (by default the model's), until `kv_blocks` are in use.

    Raises EngineError for a daemon that does not start, fill or answer.
    """
    lengths, answer = contexts(memory, kv_blocks, min(memory.max_model_len, longest or memory.max_model_len))
    blocks = sum(-(-tokens // memory.block_tokens) for tokens in lengths)
    vocabulary = msgspec.json.decode((store.path / "config.json").read_bytes())["vocab_size"]
    with _warm(store) as folder, running_daemon(_command(folder, memory, flags, kv_blocks), START_S) as (port, pid):
        experts = _fill_experts(port)
        run_streams(port, [tokens - answer for tokens in lengths], answer, vocabulary, 0)
        peak = sum(peak_rss_bytes(one) for one in process_tree(pid))
    return Filled(peak, experts, blocks * memory.kv_block)


def contexts(memory: MemoryProfile, kv_blocks: int, longest: int) -> tuple[list[int], int]:
    """Tokens of each sequence, and how many of these are its answer. One is as long as may be, others share the blocks
    that it leaves: attention over many long prompts would take hours, and blocks cost as much memory whoever has them.
    Answers are long enough that nobody has ended when the last one begins its own, as far as half of `longest` allows.
    """
    size, rows = memory.block_tokens, memory.max_sequences
    steps = -(-min(kv_blocks * size, rows * longest) // max(1, memory.max_step_tokens - rows))
    answer = min(steps + ANSWER, longest // 2)
    whole, least = -(-longest // size), answer // size + 1  # blocks; the least have room for a prompt
    left = max(0, kv_blocks - whole)
    others = min(rows - 1, left // least)
    shares = [min(whole, (left + other) // others) for other in range(others)]  # as even as they can be
    return [longest, *(min(longest, share * size) for share in shares)], answer


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
