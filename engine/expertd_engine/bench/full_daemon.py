"""A daemon that is filled to its limits, and the most memory that all its processes ever had. Owns neither.

Memory is read from outside: the kernel's high-water marks of what each process has resident, so that no peak falls
between two looks, and what is shared with neighbours counts as if there were none.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from expertd_engine.bench.http_load import run_streams
from expertd_engine.bench.serve import running_daemon
from expertd_engine.experts.store import ExpertStore
from expertd_engine.memory import peak_rss_bytes, process_tree
from expertd_engine.planning.profile import MemoryProfile

ANSWER = 12
"""Tokens that each stream says after its prompt."""
START_S = 600.0


@dataclass(frozen=True, slots=True)
class Filled:
    """Bytes."""

    peak: int
    """Of all processes."""
    kv: int
    """Of KV blocks that were written to."""


def fill(store: ExpertStore, memory: MemoryProfile, flags: Mapping[str, int], kv_blocks: int) -> Filled:
    """Run a daemon with these flags beside `memory`'s limits, and as many of the longest sequences at once as `kv_blocks`
    hold. Raises EngineError for one that does not start or answer."""
    prompt = memory.max_model_len - ANSWER
    streams = max(1, min(memory.max_sequences, kv_blocks * memory.block_tokens // memory.max_model_len))
    vocabulary = msgspec.json.decode((store.path / "config.json").read_bytes())["vocab_size"]
    written = streams * -(-memory.max_model_len // memory.block_tokens)
    with running_daemon(_command(store, memory, flags, kv_blocks), START_S) as (port, pid):
        run_streams(port, streams, prompt, ANSWER, vocabulary, 0)
        peak = sum(peak_rss_bytes(one) for one in process_tree(pid))
    return Filled(peak, written * memory.kv_block)


def _command(store: ExpertStore, memory: MemoryProfile, flags: Mapping[str, int], kv_blocks: int) -> list[str]:
    limits = {
        "--kv-budget": kv_blocks * memory.kv_block,
        "--max-model-len": memory.max_model_len,
        "--max-sequences": memory.max_sequences,
        "--max-step-tokens": memory.max_step_tokens,
    }
    command = [sys.executable, "-m", "expertd_server", "serve", str(store.path), "--port", "0", "--no-warm-restart"]
    return command + [part for flag, value in {**limits, **flags}.items() for part in (flag, str(value))]
