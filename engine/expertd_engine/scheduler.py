"""The scheduler: whose turn it is, and what becomes of a step. Through its queues it owns all sequences and blocks.

One rule: every sequence has computed tokens that catch up with its known tokens, and a step hands out one token
budget. A decode is a sequence one token behind; a prefill chunk is as much of the rest as the budget holds.

Why nobody starves. All sequences stand in one order, `rank`, fixed when they are added: arrival, with one unit of
priority worth `ageing_steps` steps of waiting, so only finitely many can ever overtake a given one. Waiting sequences
are admitted in that order and nobody passes one that does not fit. Blocks are given in that order, and whoever is
last in it gives way, so the first running one always gets what it asks for, ends, and makes room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType

from expertd_engine.batching import Batching, Chooser, Room, unbounded
from expertd_engine.errors import EngineError, ExpertdError
from expertd_engine.kv_pool import KVPool
from expertd_engine.messages import ExpertMode, FinishReason
from expertd_engine.prefix_cache import PrefixCache
from expertd_engine.queues import Queues
from expertd_engine.request import Sequence, SequenceState
from expertd_engine.step_filler import StepFiller
from expertd_engine.step_plan import Chunk, SchedulerLimits, StepPlan
from expertd_engine.trials import Trials


class SequenceRefused(ExpertdError):
    """The sequence can never run here. The message names what it needs and what there is."""


class Scheduler:
    """`schedule()` gives a plan; exactly one of `update_from_output`, `step_failed` and `step_gave_up` answers it."""

    def __init__(
        self, limits: SchedulerLimits, pool: KVPool, prefixes: PrefixCache | None = None,
        batching: Batching = "decode-first", room: Room = unbounded,
    ) -> None:  # fmt: skip
        """`prefixes`: None computes every token of every sequence. `batching` says who computes in a step whose tokens
        do not suffice for all, or whose experts find no `room`."""
        self.pool = pool
        self.prefixes = prefixes
        self._sequences: dict[int, Sequence] = {}
        """All and only the live ones."""
        self._in_flight: StepPlan | None = None
        self._ahead: StepPlan | None = None
        """What was said to come next; see `look_ahead`."""
        self._trials = Trials()
        self._arrivals = 0
        self._step = 0
        self._mode: ExpertMode = "exact"
        self._mode_steps = 0
        self.chooser = Chooser(batching, room)
        self._queues = Queues(pool, prefixes, self.chooser)
        self._filler = StepFiller(limits, pool, self._queues, self.chooser)

    @property
    def limits(self) -> SchedulerLimits:
        """Others may be given between steps."""
        return self._filler.limits

    @limits.setter
    def limits(self, limits: SchedulerLimits) -> None:
        self._filler.limits = limits

    # ------------------------------------------------------------ sequences come and go

    @property
    def num_running(self) -> int:
        """Sequences that hold a row and blocks."""
        return len(self._queues.running)

    @property
    def num_waiting(self) -> int:
        """Preempted ones included."""
        return len(self._queues.waiting)

    @property
    def num_preemptions(self) -> int:
        """Since start."""
        return self._queues.num_preemptions

    @property
    def has_sequences(self) -> bool:
        return bool(self._sequences)

    @property
    def live(self) -> Mapping[int, Sequence]:
        """All live sequences by id: a view."""
        return MappingProxyType(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Take `sequence` into the waiting queue. Raises SequenceRefused if it could never finish."""
        if sequence.sequence_id in self._sequences:
            raise EngineError(f"{sequence}: its id is in use")
        self._refuse_impossible(sequence)
        sequence.rank = (sequence.priority * self.limits.ageing_steps + self._step, self._arrivals)
        self._arrivals += 1
        self._sequences[sequence.sequence_id] = sequence
        self._queues.enqueue(sequence)

    def abort(self, sequence_id: int) -> Sequence | None:
        """End a live sequence at any point, between `schedule` and its answer too; None if it is not live.

        Its blocks are free at once, and may be handed out while the step in flight writes to them: whoever gets them
        writes behind it.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self.finish(sequence, "abort")
        return sequence

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a live sequence, once, and free what it held."""
        self._queues.end(sequence, reason)
        del self._sequences[sequence.sequence_id]

    @property
    def needed_blocks(self) -> int:
        """The most that any live sequence may come to need, and at least one."""
        return max((self._most_blocks(sequence) for sequence in self._sequences.values()), default=1)

    def resize_pool(self, num_blocks: int) -> None:
        """Change the pool's limit. Raises ValueError below what a live sequence may still need: none is lost to it."""
        needed = 1 + self.needed_blocks
        if num_blocks < needed:
            raise ValueError(f"num_blocks is {num_blocks}: the live sequences need at least {needed}")
        self.pool.resize(num_blocks)

    # ------------------------------------------------------------ a step

    def schedule(self) -> StepPlan | None:
        """The next step, with blocks allocated for it; None if no sequence is live."""
        if self._in_flight is not None:
            raise EngineError(f"step {self._in_flight.step} has not been answered")
        if (promised := self._promised()) is not None:
            return promised
        preempted: list[Sequence] = []
        chunks = self._next_trial(preempted)
        if chunks:
            return self._begin_step(chunks[0].sequence.mode, chunks, preempted)
        for mode in self._turns():
            chunks = self._filler.fill(mode, preempted)
            if chunks:
                return self._begin_step(mode, chunks, preempted)
        if self._sequences:
            raise EngineError(f"no step can be formed for {len(self._sequences)} live sequences")
        return None

    def look_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step that follows `plan`, which is in flight, if all it brings is tokens: each of its sequences decodes
        the one it is about to be given, but those for which that is the last. None where it cannot be said.

        Its blocks are allocated, for which nobody gives way, and `schedule` gives it next, less the sequences that have
        ended by then; never, if all have or `plan` fails. Whoever arrives meanwhile begins behind it.
        """
        running = self._queues.running
        is_all = len(running) == len(plan.chunks) and all(chunk.samples for chunk in plan.chunks)
        if plan is not self._in_flight or not is_all or self._trials.are_left or not self._filler.is_full_of(running):
            return None
        live = [one for one in plan.chunks if one.sequence.state is SequenceState.RUNNING]
        chunks = [Chunk(one.sequence, one.stop, 1, True) for one in live if one.stop + 1 < one.sequence.max_length]
        if not chunks or not self._queues.extend([(one.sequence, one.stop) for one in chunks]):
            return None
        self._ahead = StepPlan(self._step, plan.mode, tuple(chunks), (), plan.queue)
        return self._ahead

    def update_from_output(self, plan: StepPlan, sampled_token_ids: Mapping[int, int]) -> list[Chunk]:
        """Advance the plan's sequences and append their sampled tokens (by sequence id).

        Returns the chunks whose sequence is still live; what was computed for the others is dropped.
        """
        self._end_step(plan)
        live = [chunk for chunk in plan.chunks if chunk.sequence.state is SequenceState.RUNNING]
        for chunk in live:
            chunk.sequence.advance(chunk.num_tokens)
            if self.prefixes is not None:
                self.prefixes.publish(chunk.sequence, chunk.start)
            if chunk.samples:
                chunk.sequence.append(sampled_token_ids[chunk.sequence.sequence_id])
        return live

    def step_failed(self, plan: StepPlan, sequence_ids: Collection[int]) -> list[Sequence]:
        """End those of the plan's sequences with `error`; returns the ones that were live. The others are as before.

        Raises EngineError if none of `sequence_ids` is in the plan: then the same step would fail for ever.
        """
        self._end_step(plan)
        named = [chunk.sequence for chunk in plan.chunks if chunk.sequence.sequence_id in sequence_ids]
        if not named:
            raise EngineError(f"step {plan.step} failed by sequences {list(sequence_ids)}, none of which it holds")
        live = [sequence for sequence in named if sequence.state is SequenceState.RUNNING]
        for sequence in live:
            self.finish(sequence, "error")
        return live

    def step_gave_up(self, plan: StepPlan) -> list[Sequence]:
        """The plan failed by none of its sequences in particular. The one that failed alone, after it had failed with
        others or once before, ends with `error` and is returned; all others are as before and will be tried again."""
        self._end_step(plan)
        blamed = self._trials.gave_up([chunk.sequence.sequence_id for chunk in plan.chunks])
        if not blamed or plan.chunks[0].sequence.state is not SequenceState.RUNNING:
            return []
        self.finish(plan.chunks[0].sequence, "error")
        return [plan.chunks[0].sequence]

    def check(self) -> None:
        """Raise EngineError unless blocks balance: the pool's law, tables and references the same, and every position
        still to be computed in a block that nobody else reads."""
        self.pool.check()
        held = Counter(block for sequence in self._sequences.values() for block in sequence.block_table)
        if held != self.pool.references:
            raise EngineError(f"{held.total()} blocks in tables, {self.pool.used_blocks} in use")
        for sequence in self._queues.running:
            for block in sequence.block_table[sequence.num_computed_tokens // self.pool.block_tokens :]:
                if held[block] > 1 or self.pool.is_published(block):
                    raise EngineError(f"{sequence} would write to block {block}, which others may read")

    # ------------------------------------------------------------ forming a step

    def _turns(self) -> tuple[ExpertMode, ...]:
        """The modes of live sequences, the one whose turn it is first."""
        modes: set[ExpertMode] = {sequence.mode for sequence in self._sequences.values()}
        if len(modes) < 2:
            return tuple(modes)
        other: ExpertMode = "virtual" if self._mode == "exact" else "exact"
        return (self._mode, other) if self._mode_steps < self.limits.max_mode_steps else (other, self._mode)

    def _promised(self) -> StepPlan | None:
        """What `look_ahead` said would come, begun; None where nothing is left of it."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        chunks = [
            one
            for one in ahead.chunks
            if one.sequence.state is SequenceState.RUNNING and one.sequence.num_computed_tokens == one.start
        ]
        if chunks:
            return self._begin_step(ahead.mode, chunks, [])
        self._step += 1  # its number is known to whoever computes it already
        return None

    def _next_trial(self, preempted: list[Sequence]) -> list[Chunk]:
        """Chunks of the next group to be tried alone of which any member still runs; empty if there is none."""
        chunks: list[Chunk] = []
        while not chunks and (ids := self._trials.next()):
            group = [s for i in ids if (s := self._sequences.get(i)) and s in self._queues.running]
            if group:
                chunks = self._filler.continue_running(group[0].mode, preempted, group)
        return chunks

    def _begin_step(self, mode: ExpertMode, chunks: list[Chunk], preempted: list[Sequence]) -> StepPlan:
        queue = (*self._queues.running, *self._queues.waiting)
        plan = StepPlan(self._step, mode, tuple(chunks), tuple(preempted), queue)
        self._mode_steps = self._mode_steps + 1 if plan.mode == self._mode else 1
        self._mode = plan.mode
        self._step += 1
        self._in_flight = plan
        return plan

    def _end_step(self, plan: StepPlan) -> None:
        if plan is not self._in_flight:
            raise EngineError(f"step {plan.step} is not in flight")
        self._in_flight = None

    def _most_blocks(self, sequence: Sequence) -> int:
        """That it may ever come to need."""
        return self.pool.blocks_for(sequence.max_computed_tokens)

    def _refuse_impossible(self, sequence: Sequence) -> None:
        prompt, limit = sequence.num_prompt_tokens, self.limits.max_model_len
        if not 1 <= prompt <= limit:
            raise SequenceRefused(f"a prompt of {prompt} tokens: allowed are 1 to {limit}")
        needed, capacity = self._most_blocks(sequence), self.pool.capacity
        if needed > capacity:
            raise SequenceRefused(
                f"a sequence of up to {sequence.max_length} tokens needs {needed} KV blocks of "
                f"{self.pool.block_tokens} tokens: there are {capacity}"
            )
