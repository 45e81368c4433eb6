"""Estimates while serving what a cache that knew the future would hit, by a sample of experts in a cache scaled alike.

An interval between two uses of an expert would have been a hit if the cache had had room all through it; intervals are
judged when they end, in that order, each taking room if it fits: Belady's choice, after the fact. Sampling by expert
keeps all uses of those sampled, so a tenth of the experts in a tenth of the slots meets what the whole cache meets.
Time is counted in steps, so what a step computes with beside its cache is not counted. Costs a few microseconds for
each lookup of a sampled expert, and nothing for others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from expertd_engine.experts.sampling import sampled_experts

SAMPLED = 128
"""Experts followed, at most."""
HORIZON_STEPS = 4096
"""An interval longer than this is a miss."""


@dataclass(slots=True)
class Sampled:
    """Since start, of sampled experts."""

    lookups: int = 0
    hits: int = 0
    """Realised."""
    clairvoyant_hits: int = 0
    """What they might have been."""


class ClairvoyantEstimate:
    """Told of every lookup. `slots_in_all()` is how many experts fit into the budget now."""

    def __init__(self, experts: Sequence[int], slots_in_all: Callable[[], int], most: int = SAMPLED) -> None:
        """`experts` of each layer."""
        self.met = Sampled()
        self._slots_in_all = slots_in_all
        chosen = sampled_experts(experts, most)
        self._share = len(chosen) / sum(experts)
        self._sampled: list[frozenset[int]] = [
            frozenset(expert for at, expert in chosen if at == layer) for layer in range(len(experts))
        ]
        self._last: dict[tuple[int, int], int] = {}
        """Step of the last use."""
        self._taken = np.zeros(HORIZON_STEPS, np.int32)
        """Room taken in each of the last steps, a ring."""
        self._step = 0

    def begin_step(self) -> None:
        """A step begins: nothing is known of its room."""
        self._step += 1
        self._taken[self._step % HORIZON_STEPS] = 0

    def use(self, layer: int, experts: Sequence[int], slots: Sequence[int]) -> None:
        """The step looks these up; `slots` of the layer's experts are -1 for those not resident."""
        for expert in self._sampled[layer].intersection(experts):
            self.met.lookups += 1
            self.met.hits += slots[expert] >= 0
            last = self._last.get((layer, expert))
            self._last[layer, expert] = self._step
            if last is not None and self._step - last < HORIZON_STEPS:
                self.met.clairvoyant_hits += self._fits(last, self._step)

    def _fits(self, begin: int, end: int) -> bool:
        """Whether there was room from step `begin` until `end`; it is taken then."""
        room = max(1, round(self._slots_in_all() * self._share))
        first, last = begin % HORIZON_STEPS, end % HORIZON_STEPS
        parts = [self._taken[first:last]] if first <= last else [self._taken[first:], self._taken[:last]]
        if any(len(part) and part.max() >= room for part in parts):
            return False
        for part in parts:
            part += 1
        return True
