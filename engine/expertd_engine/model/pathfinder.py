"""Runs a pre-gating router for sequences: prompts when they are enqueued, answers token by token as they are sampled.

Paths stay with their sequence. The router's keys and values lie in the sequence's KV blocks, in a layer behind the
model's own, so that prefix-cache hits, preemption and budgets treat them like any others. A token whose block is not
allocated yet is routed over a spare one and stored with its step.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

from expertd_engine.experts.pregated import PregatedLookahead, later_unions
from expertd_engine.kernels.library import KernelError
from expertd_engine.model.kv_storage import KVStorage
from expertd_engine.model.pregate import Begun, Pregate
from expertd_engine.model.step_routes import KnownRoutes
from expertd_engine.model.step_rows import Span
from expertd_engine.paths import Paths, union_of
from expertd_engine.request import Sequence, SequenceState
from expertd_engine.step_plan import Chunk, StepPlan

logger = logging.getLogger(__name__)

_Due = tuple[Sequence, Paths, int]
"""A sequence, its paths, and the position of the token to route, before which all is routed."""


@dataclass(slots=True)
class _Batch:
    """Tokens that are routed together; and again the ones after them, while their sequences keep their blocks."""

    due: list[_Due]
    spans: list[Span]
    ends: list[int]
    """Positions that each span's blocks have room for."""
    begun: Begun

    def goes_on(self, due: list[_Due]) -> bool:
        """Whether `due` come after these. A block table grows in place; one that is given up is never used again."""
        if len(due) != len(self.due):
            return False
        for now, before, span, end in zip(due, self.due, self.spans, self.ends, strict=True):
            sequence, _, last = now
            if sequence is not before[0] or last != before[2] + 1 or last >= end:
                return False
            if span.blocks is not sequence.block_table:
                return False
        return True


class Pathfinder:
    """One engine's. `storage` has a spare block for every sequence that may run."""

    def __init__(self, pregate: Pregate, storage: KVStorage, max_step_tokens: int) -> None:
        self._pregate = pregate
        self._storage = storage
        self._spare = storage.num_blocks
        self._step_tokens = max_step_tokens
        self._batch: _Batch | None = None
        """Of sampled tokens, the last one."""
        self._under_way = False
        """It is being routed beside whatever else goes on."""

    @property
    def heads(self) -> int:
        """Choices a token: one that holds in all layers, or one for each."""
        return self._pregate.path_shape.heads

    # ------------------------------------------------------------ as soon as tokens are known

    def foresee(self, sequences: Collection[Sequence]) -> None:
        """Route what is known and not routed of `sequences`: whole prompts of waiting ones, the last token of others.

        What the box has no memory for is routed in its step.
        """
        due: list[_Due] = []
        try:
            self._settle()
            for sequence in sequences:
                paths, last = paths_of(sequence, self._pregate), sequence.num_tokens - 1
                if sequence.state is not SequenceState.RUNNING:
                    self._route_prompt(sequence, paths)
                elif len(paths) == last:
                    due.append((sequence, paths, last))
            if due:
                self._begin_last(due)
        except (KernelError, MemoryError) as error:
            logger.warning("routes are not foreseen, and come with their step: %s", error)

    def _begin_last(self, due: list[_Due]) -> None:
        """The tokens at these positions, before which all is routed, in one call, which goes on while tokens are sent
        and the next step is formed: until somebody looks at the paths, or the step begins."""
        batch, self._batch = self._batch, None  # lost if anything is raised here
        token_ids = [sequence.tokens(last, last + 1)[0] for sequence, _, last in due]
        if batch is not None and batch.goes_on(due):
            batch.due = due
            batch.begun.again(token_ids)
        else:
            batch = self._new_batch(due, token_ids)
        self._batch, self._under_way = batch, True
        for _, paths, _ in due:
            paths.awaited = self._look

    def _new_batch(self, due: list[_Due], token_ids: list[int]) -> _Batch:
        size = self._storage.block_tokens
        spans: list[Span] = []
        for row, (sequence, _, last) in enumerate(due):
            table = sequence.block_table
            if len(table) * size <= last:
                table = [*table, self._spare + row]
            spans.append(Span(row, last, 1, table))
        begun = self._pregate.begin(token_ids, [last for _, _, last in due], spans, self._storage)
        return _Batch(due, spans, [len(span.blocks) * size for span in spans], begun)

    def _look(self) -> None:
        """Somebody looks at paths of which tokens are under way."""
        try:
            self._settle()
        except (KernelError, MemoryError) as error:
            logger.warning("routes are not foreseen, and come with their step: %s", error)

    def _settle(self) -> None:
        """Take in what is under way. Raises what routing raises; then it is as if nothing had begun."""
        if not self._under_way:
            return
        batch, self._batch, self._under_way = self._batch, None, False
        assert batch is not None
        for _, paths, _ in batch.due:
            paths.awaited = None
        routes = batch.begun.finish()
        for row, (sequence, paths, last) in enumerate(batch.due):
            paths.extend(routes, row, row + 1)
            if paths.stored == last and batch.spans[row].blocks is sequence.block_table:
                paths.stored += 1
        self._batch = batch

    def _route_prompt(self, sequence: Sequence, paths: Paths) -> None:
        """All known tokens, over keys and values that are dropped again: the sequence has no blocks yet. In pieces no
        larger than a step, whose memory is planned for."""
        size, count = self._storage.block_tokens, sequence.num_tokens
        if len(paths):
            return  # a preempted one knows its paths
        blocks = list(range(1, 1 + -(-count // size)))
        storage = KVStorage([self._pregate.kv_shape], len(blocks) + 1, size, self._storage.dtype)
        for start, stop in pairwise([*range(0, count, self._step_tokens), count]):
            span = Span(0, start, stop - start, blocks)
            routes = self._pregate.route(sequence.tokens(start, stop), range(start, stop), [span], storage)
            paths.extend(routes, 0, stop - start)

    # ------------------------------------------------------------ in a step

    def for_step(self, plan: StepPlan) -> KnownRoutes:
        """Routes of the plan's rows. Afterwards the router's keys and values of these tokens lie in their blocks."""
        self._look()
        rows = [(chunk, paths_of(chunk.sequence, self._pregate)) for chunk in plan.chunks]
        missing = [(chunk, paths) for chunk, paths in rows if paths.stored < chunk.stop]
        if missing:
            self._store(missing)
        return self._pregate.known(paths.routes(chunk.start, chunk.stop) for chunk, paths in rows)

    def _store(self, missing: Collection[tuple[Chunk, Paths]]) -> None:
        """Run the router where its keys and values, or its routes, are still missing."""
        spans, row = [], 0
        for chunk, paths in missing:
            start = max(chunk.start, paths.stored)
            spans.append(Span(row, start, chunk.stop - start, chunk.sequence.block_table))
            row += chunk.stop - start
        each = list(zip(missing, spans, strict=True))
        tokens = [token for (chunk, _), span in each for token in chunk.sequence.tokens(span.start, chunk.stop)]
        positions = [p for span in spans for p in range(span.start, span.start + span.length)]
        routes = self._pregate.route(tokens, positions, spans, self._storage)
        for (chunk, paths), span in each:
            known = len(paths) - span.start  # of the span
            if known < span.length:
                paths.extend(routes, span.row + known, span.row + span.length)
            paths.stored = chunk.stop

    def tell(self, lookahead: PregatedLookahead, plan: StepPlan, known: KnownRoutes) -> None:
        """What the plan's step uses, and what waits behind it."""
        lookahead.plan(union_of(known.routes.experts, known.shape), later_unions(plan, self._step_tokens))


def paths_of(sequence: Sequence, pregate: Pregate) -> Paths:
    """The sequence's paths, which begin empty."""
    if sequence.paths is None:
        sequence.paths = Paths(pregate.path_shape if sequence.mode == "exact" else pregate.scored_shape)
    return sequence.paths
