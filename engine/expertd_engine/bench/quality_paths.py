"""What virtual mode costs in quality where one index holds in all layers: whole paths for those that are not held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np

from expertd_engine.bench.quality_points import CACHE_PRIOR, QualityBench
from expertd_engine.calibration import TextEngine, Window, with_paths
from expertd_engine.experts.virtual_paths import Served
from expertd_engine.model.path_routing import PathRouting
from expertd_engine.model.step_routes import KnownRoutes

METHODS = ("paths", "counts", "chances", "norms", "random", "cache-prior")
"""`paths` is what is served. In `counts` a path is worth its tokens; `chances` is static, by the router's probability
on other text; so are `norms`, by ‖E‖, and `random`; cache-prior routing may fetch."""


_LEAST_CHANCE = 1e-30


class CountedPaths(PathRouting):
    """Paths are worth their tokens, however sure the router was of them."""

    def importance(self, own: Sequence[int], chances: Sequence[Sequence[float]]) -> dict[int, float]:
        return dict(Counter(own))


class CachePriorPaths(PathRouting):
    """Held paths are preferred, not demanded: a token's own that beats them by the margin is fetched."""

    def answer(
        self,
        chances: Sequence[float],
        own: int,
        whole: Collection[int],
        held: Sequence[Collection[int]],
        limit: float,
    ) -> Served | None:
        logits = np.log(np.maximum(chances, _LEAST_CHANCE))
        preferred = max((logits[path] for path in whole), default=-np.inf) + CACHE_PRIOR * np.ptp(logits)
        return None if logits[own] > preferred else super().answer(chances, own, whole, held, limit)


MOVING: Mapping[str, type[PathRouting]] = {
    "paths": PathRouting, "counts": CountedPaths, "cache-prior": CachePriorPaths,
}  # fmt: skip
"""Methods whose paths are swapped."""


class Listener(PathRouting):
    """Computes exactly, and keeps what the router gave each path."""

    def __init__(self, model: PathRouting) -> None:
        super().__init__(model.sets, model.held, model.sizes)
        self.total = [0.0] * len(model.sizes)
        """By path."""

    def begin_step(self, limits: Sequence[float], known: KnownRoutes) -> None:
        self.total = [sum(column) for column in zip(self.total, *self.chances(known), strict=True)]


class PathQuality(QualityBench):
    """Of models of one index. `calibration`: other text, for the method that wants some."""

    methods = METHODS

    def __init__(
        self, text: TextEngine, windows: Sequence[Window], calibration: Sequence[Window], model: PathRouting
    ) -> None:
        super().__init__(text, windows, model)
        self._calibration = calibration
        self._model = model

    def _routing(self, method: str, slots: Sequence[int]) -> PathRouting:
        served, paths = self._model.sets.limits, min(slots)
        if method in MOVING:
            return with_paths(self._model, paths, served, self._model.sizes, MOVING[method])
        return with_paths(self._model, paths, replace(served, per_step=0), self._prior(method))

    def _prior(self, method: str) -> Sequence[float]:
        if method == "norms":
            return self._model.sizes
        if method == "random":
            chance = Random(0)
            return [chance.random() for _ in self._model.sizes]
        listener = Listener(self._model)
        self._text.tell(self._calibration, listener, settle=False)
        return listener.total
