"""Runs a pre-gating router for sequences: prompts when they are enqueued, answers token by token as they are sampled.

Paths stay with their sequence. The router's keys and values lie in the sequence's KV blocks, in a layer behind the
model's own, so that prefix-cache hits, preemption and budgets treat them like any others. A token whose block is not
allocated yet is routed over a spare one and stored with its step.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from expertd_engine.experts.pregated import PregatedLookahead, later_unions, step_union
from expertd_engine.kernels.library import KernelError
from expertd_engine.model.attention import KVStorage, Span
from expertd_engine.model.moe import KnownRoutes
from expertd_engine.model.pregate import Pregate
from expertd_engine.paths import Paths
from expertd_engine.request import Sequence, SequenceState
from expertd_engine.scheduler import Chunk, StepPlan

logger = logging.getLogger(__name__)

Flat: TypeAlias = tuple[NDArray[np.uint16], NDArray[np.float32]]


class Pathfinder:
    """One engine's. `storage` has a spare block for every sequence that may run."""

    def __init__(self, pregate: Pregate, storage: KVStorage, max_step_tokens: int) -> None:
        self._pregate = pregate
        self._storage = storage
        self._spare = storage.num_blocks
        self._step_tokens = max_step_tokens

    @property
    def heads(self) -> int:
        """Choices a token: one that holds in all layers, or one for each."""
        return self._pregate.path_shape.heads

    # ------------------------------------------------------------ as soon as tokens are known

    def foresee(self, sequences: Collection[Sequence]) -> None:
        """Route what is known and not routed of `sequences`: whole prompts of waiting ones, the last token of others.

        What the box has no memory for is routed in its step.
        """
        try:
            self._route_last([s for s in sequences if s.state is SequenceState.RUNNING])
            for sequence in sequences:
                if sequence.state is not SequenceState.RUNNING:
                    self._route_prompt(sequence)
        except (KernelError, MemoryError) as error:
            logger.warning("routes are not foreseen, and come with their step: %s", error)

    def _route_last(self, sequences: Iterable[Sequence]) -> None:
        """Sequences all of whose tokens but the last are computed, in one call."""
        due = [s for s in sequences if len(paths_of(s, self._pregate)) == s.num_tokens - 1]
        if not due:
            return
        covered = [len(s.block_table) * self._storage.block_tokens >= s.num_tokens for s in due]
        spans = [
            Span(row, s.num_tokens - 1, 1, s.block_table if has_block else [*s.block_table, self._spare + row])
            for row, (s, has_block) in enumerate(zip(due, covered, strict=True))
        ]
        routes = self._route([s.tokens(s.num_tokens - 1, s.num_tokens)[0] for s in due], spans, self._storage)
        for row, (sequence, has_block) in enumerate(zip(due, covered, strict=True)):
            paths = paths_of(sequence, self._pregate)
            _extend(paths, routes, row, row + 1)
            if has_block and paths.stored == sequence.num_tokens - 1:
                paths.stored += 1

    def _route_prompt(self, sequence: Sequence) -> None:
        """All known tokens, over keys and values that are dropped again: the sequence has no blocks yet. In pieces no
        larger than a step, whose memory is planned for."""
        paths, size, count = paths_of(sequence, self._pregate), self._storage.block_tokens, sequence.num_tokens
        if len(paths):
            return  # a preempted one knows its paths
        blocks = list(range(1, 1 + -(-count // size)))
        storage = KVStorage([self._pregate.kv_shape], len(blocks) + 1, size, self._storage.dtype)
        for start, stop in pairwise([*range(0, count, self._step_tokens), count]):
            routes = self._route(sequence.tokens(start, stop), [Span(0, start, stop - start, blocks)], storage)
            _extend(paths, routes, 0, stop - start)

    # ------------------------------------------------------------ in a step

    def for_step(self, plan: StepPlan) -> KnownRoutes:
        """Routes of the plan's rows. Afterwards the router's keys and values of these tokens lie in their blocks."""
        self._store(plan.chunks)
        known = [_slices(paths_of(c.sequence, self._pregate), c.start, c.stop) for c in plan.chunks]
        index, weights = (np.concatenate(parts, axis=0) for parts in zip(*known, strict=True))
        return KnownRoutes(
            torch.from_numpy(index.astype(np.int64)).transpose(0, 1), torch.from_numpy(weights).transpose(0, 1)
        )

    def _store(self, chunks: Iterable[Chunk]) -> None:
        """Run the router where its keys and values, or its routes, are still missing."""
        missing = [(c, max(c.start, paths_of(c.sequence, self._pregate).stored)) for c in chunks]
        missing = [(chunk, start) for chunk, start in missing if start < chunk.stop]
        if not missing:
            return
        spans, row = [], 0
        for chunk, start in missing:
            spans.append(Span(row, start, chunk.stop - start, chunk.sequence.block_table))
            row += chunk.stop - start
        tokens = [token for chunk, start in missing for token in chunk.sequence.tokens(start, chunk.stop)]
        routes = self._route(tokens, spans, self._storage)
        for (chunk, start), span in zip(missing, spans, strict=True):
            paths = paths_of(chunk.sequence, self._pregate)
            known = len(paths) - start  # of the span
            if known < span.length:
                _extend(paths, routes, span.row + known, span.row + span.length)
            paths.stored = chunk.stop

    def tell(self, lookahead: PregatedLookahead, plan: StepPlan) -> None:
        """What the plan's step uses, and what waits behind it."""
        lookahead.plan(step_union(plan), later_unions(plan, self._step_tokens))

    def _route(self, token_ids: list[int], spans: list[Span], storage: KVStorage) -> Flat:
        positions = [p for span in spans for p in range(span.start, span.start + span.length)]
        return _flat(self._pregate.route(token_ids, positions, spans, storage))


def paths_of(sequence: Sequence, pregate: Pregate) -> Paths:
    """The sequence's paths, which begin empty."""
    if sequence.paths is None:
        sequence.paths = Paths(pregate.path_shape)
    return sequence.paths


def _flat(routes: KnownRoutes) -> Flat:
    """As paths keep them: experts and weights `[T, heads, K]`."""
    index = np.ascontiguousarray(routes.index.numpy().transpose(1, 0, 2), np.uint16)
    return index, np.ascontiguousarray(routes.weights.numpy().transpose(1, 0, 2), np.float32)


def _extend(paths: Paths, routes: Flat, start: int, stop: int) -> None:
    """Append rows of `routes`."""
    experts, weights = routes
    paths.extend(experts[start:stop].tobytes(), weights[start:stop].tobytes())


def _slices(paths: Paths, start: int, stop: int) -> Flat:
    """Experts and weights `[tokens, heads, K]`, copied: an array that is looked at cannot grow."""
    shape, stride = (stop - start, paths.shape.heads, paths.shape.top_k), paths.shape.stride
    experts = np.array(paths.experts[start * stride : stop * stride], np.uint16)
    return experts.reshape(shape), np.array(paths.weights[start * stride : stop * stride], np.float32).reshape(shape)
