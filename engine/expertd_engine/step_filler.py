"""Which tokens of which sequences a step computes, once its mode is known. The scheduler's own. Pure."""

from __future__ import annotations

from collections.abc import Collection

from expertd_engine.batching import Chooser
from expertd_engine.kv_pool import KVPool
from expertd_engine.messages import ExpertMode
from expertd_engine.queues import Queues
from expertd_engine.request import Sequence
from expertd_engine.step_plan import Chunk, SchedulerLimits


class StepFiller:
    """Hands a step's tokens out: to all that run, or, where the batching passes some over, to those it chooses."""

    def __init__(self, limits: SchedulerLimits, pool: KVPool, queues: Queues, chooser: Chooser) -> None:
        self.limits = limits
        """Of the next step."""
        self._pool = pool
        self._queues = queues
        self._chooser = chooser

    @property
    def _max_running(self) -> int:
        # Where all step, decodes leave a token for every row that prefills; else the more run, the more is to choose.
        return self.limits.max_sequences if self._chooser.passes_over else self.limits.max_rows

    def is_full_of(self, running: Collection[Sequence]) -> bool:
        """Whether a step of one token for each of these leaves nobody out: no one waits who could be admitted, and no
        one is passed over."""
        could_begin = self._queues.waiting and len(running) < self._max_running
        return not (could_begin or self._chooser.passes_over) and len(running) <= self.limits.max_step_tokens

    def fill(self, mode: ExpertMode, preempted: list[Sequence]) -> list[Chunk]:
        """Chunks of a step of `mode`, blocks allocated; empty if none of its sequences can compute. Whoever gave way
        for it is added to `preempted`."""
        if self._chooser.passes_over:
            return self._choose_running(mode, preempted)
        chunks = self.continue_running(mode, preempted)
        if not preempted:
            chunks += self._admit_waiting(mode, chunks)
        return chunks

    def _choose_running(self, mode: ExpertMode, preempted: list[Sequence]) -> list[Chunk]:
        """Admit whoever fits, then let the batching say who of all running ones computes.

        Whoever is chosen may have to give way to others of the choice, last in rank first: if that leaves nobody,
        others are chosen. The first by rank never gives way, so there is an end.
        """
        self._admit_ahead()
        chunks: list[Chunk] = []
        while not chunks and (rows := [s for s in self._queues.running if s.mode == mode]):
            shares = self._chooser.shares(rows, self.limits)
            for sequence in rows:
                num_tokens = shares.get(sequence.sequence_id, 0)
                if num_tokens > 1:
                    num_tokens = self._scorable(sequence, num_tokens, chunks)
                if num_tokens and self._queues.make_room(sequence, num_tokens, preempted):
                    chunks.append(_chunk(sequence, num_tokens))
        still = [s for s in self._queues.running if s.mode == mode]
        self._chooser.stepped(still, {chunk.sequence.sequence_id for chunk in chunks})
        return chunks

    def _admit_ahead(self) -> None:
        """Admit by rank while there are rows, and blocks beside one for each running sequence to go on with."""
        while self._queues.waiting and len(self._queues.running) < self._max_running:
            if self._queues.running and self._pool.free_blocks <= len(self._queues.running):
                break
            if not self._queues.admit():
                break

    def continue_running(
        self, mode: ExpertMode, preempted: list[Sequence], among: Collection[Sequence] | None = None
    ) -> list[Chunk]:
        """Chunks of running sequences: a token for every decode, the rest of the budget to prefills by rank.

        Blocks are given by rank, so who gives way (the last in rank) has never been given its chunk before.
        """
        rows = [s for s in self._queues.running if s.mode == mode and (among is None or s in among)]
        left = self.limits.max_step_tokens - sum(sequence.num_uncomputed_tokens == 1 for sequence in rows)
        chunks: list[Chunk] = []
        for sequence in rows:
            num_tokens = sequence.num_uncomputed_tokens
            if num_tokens > 1:
                num_tokens = self._scorable(sequence, min(num_tokens, left), chunks)
                left -= num_tokens
            if num_tokens and self._queues.make_room(sequence, num_tokens, preempted):
                chunks.append(_chunk(sequence, num_tokens))
        return chunks

    def _scorable(self, sequence: Sequence, num_tokens: int, chunks: Collection[Chunk]) -> int:
        """At most `num_tokens`, so few that their prompt logprobs fit into the step beside those of `chunks`."""
        start = sequence.num_computed_tokens
        wanted = sequence.unscored(start, start + num_tokens)
        left = self.limits.max_scored_tokens - sum(len(chunk.prompt_logprob_positions) for chunk in chunks)
        return num_tokens if len(wanted) <= left else wanted.start + left - start

    def _admit_waiting(self, mode: ExpertMode, running: Collection[Chunk]) -> list[Chunk]:
        """Admit by rank while there are tokens, rows, and blocks for *all* known tokens of the next one.

        With blocks for a first chunk alone, sequences admitted together would starve each other and be computed
        twice. One of the other mode gets its row and blocks here too, in its place, and its tokens at its turn.
        """
        tokens = self.limits.max_step_tokens - sum(chunk.num_tokens for chunk in running)
        chunks: list[Chunk] = []
        while self._queues.waiting and tokens and len(self._queues.running) < self._max_running:
            sequence = self._queues.waiting[0]
            if not self._queues.admit():
                break
            if sequence.mode != mode:
                continue
            num_tokens = self._scorable(sequence, min(sequence.num_uncomputed_tokens, tokens), [*running, *chunks])
            if num_tokens:
                chunks.append(_chunk(sequence, num_tokens))
                tokens -= num_tokens
        return chunks


def _chunk(sequence: Sequence, num_tokens: int) -> Chunk:
    reaches_end = num_tokens == sequence.num_uncomputed_tokens
    samples = reaches_end and sequence.num_tokens < sequence.max_length
    return Chunk(sequence, sequence.num_computed_tokens, num_tokens, samples)
