"""Builders for the pure half of the engine, and a forward pass that notices every lost, doubled or moved token.

`HashForward` keeps a toy KV cache addressed by block and offset. The next token is a hash of the whole history *as read
through the block table*, so a block given to two sequences, a table out of order or a token not computed anew after a
preemption changes the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from expertd_engine.batching import Batching
from expertd_engine.core import EngineCore, Forward, SampledToken, StepFailed, StepResult
from expertd_engine.kv_pool import KVPool
from expertd_engine.messages import ExpertMode, Finished, Sampling, Steps, Submit, TextInput, TokenLogprob
from expertd_engine.prefix_cache import PrefixCache
from expertd_engine.request import Sequence
from expertd_engine.scheduler import Scheduler
from expertd_engine.sequence_stats import ExpertCounts
from expertd_engine.step_plan import Chunk, SchedulerLimits, StepPlan

VOCAB = 50
EOS = 0
STEP_S = 0.5
STEP_EXPERTS = ExpertCounts(hits=3, late=2, misses=1, loaded_bytes=4096, stall_s=0.25)


def make_submit(
    sequence_id: int = 1,
    prompt: Iterable[int] = (5, 6, 7),
    *,
    priority: int = 0,
    mode: ExpertMode = "exact",
    cache_salt: str = "",
    **sampling: Any,
) -> Submit:
    inputs = [TextInput(list(prompt))]
    return Submit(
        sequence_id, inputs, Sampling(**sampling), priority=priority, mode=mode, cache_salt=cache_salt
    )  # fmt: skip


def make_sequence(
    sequence_id: int = 1,
    prompt: Iterable[int] = (5, 6, 7),
    *,
    priority: int = 0,
    mode: ExpertMode = "exact",
    **sampling: Any,
) -> Sequence:
    message = make_submit(sequence_id, prompt, priority=priority, mode=mode, **sampling)
    return Sequence.from_submit(message, eos_token_ids=frozenset({EOS}), max_model_len=1000, now_s=0.0)


def make_scheduler(
    *, num_blocks: int = 100, block_tokens: int = 4, max_sequences: int = 8, max_step_tokens: int = 64,
    max_model_len: int = 1000, prefix_cache: bool = False, batching: Batching = "decode-first", **limits: int,
) -> Scheduler:  # fmt: skip
    pool = KVPool(num_blocks, block_tokens)
    prefixes = PrefixCache(pool, "store") if prefix_cache else None
    return Scheduler(SchedulerLimits(max_sequences, max_step_tokens, max_model_len, **limits), pool, prefixes, batching)


@dataclass
class HashForward:
    """Deterministic in each sequence's own history. `before` may abort, submit or raise StepFailed mid-step."""

    block_tokens: int = 4
    before: Callable[[StepPlan], None] = lambda plan: None
    plans: list[StepPlan] = field(default_factory=list)
    memory: dict[tuple[int, int], int] = field(default_factory=dict)

    def __call__(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        tables = {chunk.sequence.sequence_id: list(chunk.sequence.block_table) for chunk in plan.chunks}
        known = {c.sequence.sequence_id: c.sequence.tokens(c.start, c.stop) for c in plan.chunks}
        scored = {c.sequence.sequence_id: self._prompt_logprobs(c) for c in plan.chunks if c.prompt_logprob_positions}
        self.before(plan)
        sampled = {}
        for chunk in plan.chunks:
            sequence_id = chunk.sequence.sequence_id
            for position, token_id in zip(range(chunk.start, chunk.stop), known[sequence_id], strict=True):
                self.memory[self._place(tables[sequence_id], position)] = token_id
        for chunk in plan.chunks:
            sequence_id = chunk.sequence.sequence_id
            history = [self.memory[self._place(tables[sequence_id], p)] for p in range(chunk.stop)]
            if chunk.samples:
                sampled[sequence_id] = SampledToken(next_token(history, chunk.sequence.banned_until_min()))
        return StepResult(sampled, STEP_S, scored, STEP_EXPERTS)

    def _place(self, table: list[int], position: int) -> tuple[int, int]:
        return table[position // self.block_tokens], position % self.block_tokens

    def _prompt_logprobs(self, chunk: Chunk) -> list[TokenLogprob]:
        prompt = chunk.sequence.prompt_token_ids
        return [TokenLogprob(prompt[p + 1], -float(p), []) for p in chunk.prompt_logprob_positions]


def next_token(history: list[int], banned: frozenset[int] = frozenset()) -> int:
    token_id = zlib.crc32(repr(history).encode()) % VOCAB
    while token_id in banned:
        token_id = (token_id + 1) % VOCAB
    return token_id


def make_core(scheduler: Scheduler | None = None, forward: Forward | None = None) -> EngineCore:
    scheduler = scheduler or make_scheduler()
    return EngineCore(scheduler, forward or HashForward(scheduler.pool.block_tokens), [EOS])


@dataclass
class Told:
    """All that a core has told, by sequence id; refuses what follows a `Finished`, a second one included."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprob | None]] = field(default_factory=dict)
    finished: dict[int, Finished] = field(default_factory=dict)

    def take(self, steps: Steps) -> None:
        for output in steps.outputs:
            assert output.sequence_id not in self.finished
            self.tokens.setdefault(output.sequence_id, []).extend(output.token_ids)
            if output.prompt_logprobs is not None:
                assert output.sequence_id not in self.prompt_logprobs
                self.prompt_logprobs[output.sequence_id] = output.prompt_logprobs
        for finished in steps.finished:
            assert finished.sequence_id not in self.finished
            self.finished[finished.sequence_id] = finished

    def reasons(self) -> dict[int, str]:
        return {sequence_id: finished.reason for sequence_id, finished in self.finished.items()}


def run_to_end(core: EngineCore, told: Told | None = None, *, max_steps: int = 10_000) -> Told:
    """Step until there is nothing to do; fails where that takes more than `max_steps`."""
    told = told or Told()
    for step in range(max_steps):
        if not core.has_work:
            return told
        told.take(core.step(step * STEP_S))
    raise AssertionError(f"still {core.scheduler.num_running} running, {core.scheduler.num_waiting} waiting")


def run_alone(message: Submit) -> Told:
    """What a sequence brings with all the room in the world."""
    core = make_core()
    core.submit(message, 0.0)
    return run_to_end(core)


def fail_once(sequence_id: int, reason: str = "out of luck") -> Callable[[StepPlan], None]:
    """A `before` that fails the first step in which the sequence takes part."""
    armed = [True]

    def before(plan: StepPlan) -> None:
        if armed[0] and any(chunk.sequence.sequence_id == sequence_id for chunk in plan.chunks):
            armed[0] = False
            raise StepFailed([sequence_id], reason)

    return before
