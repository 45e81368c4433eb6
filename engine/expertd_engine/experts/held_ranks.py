"""Best outside and worst inside of all layers of virtual mode at once, with numpy: for sets that all layers of a step
are added to together. Owns no set.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.virtual import VirtualExperts

Bools: TypeAlias = NDArray[np.bool_]
Doubles: TypeAlias = NDArray[np.float64]


class HeldRanks:
    """Of these sets, which keep best and worst (`SwapLimits.per_step`) and are asked for them by nobody between."""

    def __init__(self, sets: VirtualExperts) -> None:
        self._sets = sets
        self._scores: Doubles = np.frombuffer(sets.scores).reshape(len(sets.priors), sets.width)
        self._priors: Doubles = np.full(self._scores.shape, -np.inf)
        for row, prior in zip(self._priors, sets.priors, strict=True):
            row[: len(prior)] = prior
        self._outside: Bools = np.zeros(self._scores.shape, bool)
        self._victims: Bools = np.zeros(self._scores.shape, bool)
        """Both right for layers that are as told."""

    def observe(self, sums: NDArray[np.float32]) -> None:
        """As `VirtualExperts.observe`, of all layers and all experts: `[L, widest E]`."""
        self._scores += sums * self._sets.unit
        self._sets.observed(range(len(self._scores)))

    def seek(self) -> None:
        """Have layers know their best and worst: as each would find them."""
        layers = self._sets.layers
        rows = [number for number, layer in enumerate(layers) if layer.is_to_be_sought]
        if not rows:
            return
        for number in rows:
            if not (layer := layers[number]).is_as_told:
                layer.is_as_told = True
                for told, now in (self._outside[number], layer.outside()), (self._victims[number], layer.victims()):
                    told[:] = False
                    told[list(now)] = True
        at: list[int] | slice = rows if len(rows) < len(layers) else slice(None)
        scores, priors = self._scores[at], self._priors[at]
        best, worst = _first(scores, priors, self._outside[at]), _first(-scores, -priors, self._victims[at])
        for number, comes, goes in zip(rows, best, worst, strict=True):
            layers[number].know(comes, goes)


def _first(scores: Doubles, priors: Doubles, among: Bools) -> list[int | None]:
    """In each row the highest score among these, of equals the highest prior, of equals the lowest id."""
    found = np.where(among, scores, -np.inf)
    highest = among & (found == found.max(axis=1, keepdims=True))
    places = np.where(highest, priors, -np.inf).argmax(axis=1)
    return [place if any_ else None for place, any_ in zip(places.tolist(), highest.any(axis=1).tolist(), strict=True)]
