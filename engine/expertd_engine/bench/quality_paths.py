"""What virtual mode costs in quality where one index holds in all layers: whole paths for those that are not held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np

from expertd_engine.bench.quality_points import QualityBench
from expertd_engine.calibration import TextEngine, Window
from expertd_engine.experts.held import HeldExperts
from expertd_engine.experts.virtual import SwapLimits
from expertd_engine.experts.virtual_paths import VirtualPaths
from expertd_engine.model.path_routing import PathRouting
from expertd_engine.model.step_routes import KnownRoutes
from expertd_engine.model.substitution import Floats

METHODS = ("paths", "counts", "chances", "norms", "random")
"""`paths` is what is served. In `counts` a path is worth its tokens; `chances` is static, by the router's probability
on other text; so are `norms`, by ‖E‖, and `random`."""


class CountedPaths(PathRouting):
    """Paths are worth their tokens, however sure the router was of them."""

    def importance(self, own: Sequence[int], chances: Floats) -> Floats:
        return np.bincount(own, minlength=chances.shape[1]).astype(np.float32)


class Listener(PathRouting):
    """Computes exactly, and keeps what the router gave each path."""

    def __init__(self, model: PathRouting) -> None:
        super().__init__(model.sets, model.held, model.sizes)
        self.total = np.zeros_like(model.sizes)

    def begin_step(self, limits: Sequence[float], known: KnownRoutes) -> None:
        self.total += self.chances(known).sum(axis=0)


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
        served = self._model.sets.limits
        kind = CountedPaths if method == "counts" else PathRouting
        if method in ("paths", "counts"):
            return self._with(slots, served, self._model.sizes, kind)
        return self._with(slots, replace(served, per_step=0), self._prior(method), kind)

    def _prior(self, method: str) -> Floats:
        if method == "norms":
            return self._model.sizes
        if method == "random":
            chance = Random(0)
            return np.array([chance.random() for _ in self._model.sizes], np.float32)
        listener = Listener(self._model)
        self._text.tell(self._calibration, listener, settle=False)
        return listener.total

    def _with(self, slots: Sequence[int], limits: SwapLimits, prior: Floats, kind: type[PathRouting]) -> PathRouting:
        """Of as many paths as a layer has slots, in sets of their own."""
        sets = VirtualPaths(prior.tolist(), len(slots), limits)
        room = replace(self._model.held.room, wanted=slots, share=1.0)
        return kind(sets, HeldExperts(self._model.held.cache, sets, room), self._model.sizes)
