"""Sends the tokens of virtual steps along held paths, where one index holds in all layers, and observes where they
would have gone. Owns the counts.

All is known before the step: what the router gave every path comes with a token's route. So a virtual step is an exact
one of other routes, and its layers know nothing of it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from expertd_engine.experts.held import HeldExperts
from expertd_engine.experts.virtual_paths import Served, VirtualPaths, serve
from expertd_engine.model.step_routes import KnownRoutes
from expertd_engine.model.virtual_counts import VirtualCounts
from expertd_engine.paths import PathShape, Routes
from expertd_engine.sequence_stats import Substitutions


class PathRouting:
    """Routes virtual steps of a model of one index. `sizes` `[E]` are the paths' norms, which importance is weighed by;
    `sets` is what `held` carries out. In plain numbers: for the few paths of a token or two an array costs more."""

    def __init__(self, sets: VirtualPaths, held: HeldExperts, sizes: Sequence[float]) -> None:
        self.sets = sets
        self.held = held
        self.sizes = sizes
        self._layers = len(held.room.experts)
        self.counts = VirtualCounts.of(self._layers)
        self.settles = False
        """Steps begin with nothing on its way: for measurements whose result may depend on nothing but the text."""
        self._substituted: list[int] = []
        self._mass: list[float] = []

    def begin_step(self, limits: Sequence[float], known: KnownRoutes) -> KnownRoutes | None:
        """The routes of a step of these tokens, with such limits of substituted mass in a layer; None where the budget
        is too small, and it is computed exactly. As `HeldExperts.begin_step`; what is held stays until `end_step`,
        unless a token waits for its own path."""
        own, chances = known.routes.experts, self.chances(known)
        self.sets.observe_paths(self.importance(own, chances))
        self._substituted, self._mass = [0] * len(own), [0.0] * len(own)
        if not self.held.begin_step():
            return None
        if self.settles:
            self.held.settle()
        return self._along_held(own, chances, limits, known)

    def chances(self, known: KnownRoutes) -> list[list[float]]:
        """What the router gave each path, `[T, E]`."""
        logits, width = known.routes.logits, len(self.sizes)
        return [_softmax(logits[start : start + width]) for start in range(0, len(logits), width)]

    def importance(self, own: Sequence[int], chances: Sequence[Sequence[float]]) -> dict[int, float]:
        """SwapMoE's score of the paths that tokens go: of these, their router's probability times ‖E‖. (There is no ‖x‖
        before the step.)"""
        sums = dict.fromkeys(own, 0.0)
        for path, row in zip(own, chances, strict=True):
            sums[path] += row[path] * self.sizes[path]
        return sums

    def end_step(self, sequences: int) -> None:
        """The step of so many sequences has ended, well or not."""
        self.counts.tokens += len(self._mass)
        self.sets.stay = False
        self.held.end_step(len(self._mass) / max(1, sequences))

    def row_counts(self, start: int, stop: int) -> Substitutions:
        """What the rows from `start` to `stop` met in the step, over all layers."""
        return Substitutions(
            choices=(stop - start) * self._layers,
            substituted=sum(self._substituted[start:stop]),
            mass=sum(self._mass[start:stop]),
            tokens=stop - start,
        )

    def answer(
        self,
        chances: Sequence[float],
        own: int,
        whole: Collection[int],
        held: Sequence[Collection[int]],
        limit: float,
    ) -> Served | None:
        """As `serve`."""
        return serve(chances, own, whole, held, limit)

    def _along_held(
        self, own: Sequence[int], chances: Sequence[Sequence[float]], limits: Sequence[float], known: KnownRoutes
    ) -> KnownRoutes:
        whole = self.sets.whole()
        if whole.issuperset(own):
            self.sets.stay = True
            self._count(own, ())
            return known
        held = [self.sets.held(layer) for layer in range(self._layers)]
        served = [
            None if path in whole else self.answer(row, path, whole, held, limit)
            for path, row, limit in zip(own, chances, limits, strict=True)
        ]
        lacking = [
            sum(path not in layer for layer in held) if other is None and path not in whole else 0
            for path, other in zip(own, served, strict=True)
        ]
        self.counts.fetched += sum(lacking)
        self.sets.stay = not any(lacking)
        self._count(own, [(row, other) for row, other in enumerate(served) if other is not None])
        return _routes(own, served, self._layers, known)

    def _count(self, own: Sequence[int], served: Iterable[tuple[int, Served]]) -> None:
        """Who computes rows in the place of their `own`, by row."""
        counts = self.counts
        for layer in range(self._layers):
            counts.activations[layer] += len(own)
        for row, other in served:
            self._mass[row] = sum(other.masses) / len(other.masses)
            for layer in range(self._layers):
                replaced = int(other.in_layer(layer) != own[row])
                self._substituted[row] += replaced
                counts.substituted[layer] += replaced
                counts.mass[layer] += other.masses[layer % len(other.masses)]


def _softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    lifted = [math.exp(logit - top) for logit in logits]
    total = sum(lifted)
    return [one / total for one in lifted]


def _routes(own: Sequence[int], served: Sequence[Served | None], layers: int, known: KnownRoutes) -> KnownRoutes:
    """One choice for all layers, unless a token takes several paths."""
    one = all(other is None or len(other.paths) == 1 for other in served)
    heads = range(1 if one else layers)
    experts = array("q", [path if other is None else other.in_layer(head)
                          for path, other in zip(own, served, strict=True) for head in heads])  # fmt: skip
    weights = known.routes.weights if one else array("f", [1.0]) * len(experts)
    return replace(known, routes=Routes(experts, weights), shape=PathShape(len(heads), 1))
