"""How many slots to keep set aside on a device: enough for what lands and what is prefetched in a step. Pure.

A slot set aside holds no expert that could be hit; one that is missing makes a step read an expert over the link again
the next time. What a step lands or prefetches is known when the next one runs, and a slot given up then is there for
the one after: so steps draw on two steps' worth of slots, of either kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from expertd_engine.experts.device_events import Provide

_WEIGHT = 0.2
"""Of the last step in the moving averages."""
_GROWTH = 1.5
"""How many more prefetches a step is taken to have sought than it made, where slots ran out: how many, nobody knows."""
MOST_SHARE = 5
"""At most a fifth of the slots for each of the two uses, where experts would have to give way for it."""


@dataclass(slots=True)
class Aside:
    """Moving averages of a step's misses and prefetches."""

    misses: float = 0.0
    prefetches: float = 0.0
    steps: int = 0

    def step(self, misses: int, prefetches: int, *, fell_short: bool = False) -> None:
        """A step has ended. `fell_short`: the link stood still for want of slots to prefetch into."""
        self.steps += 1
        weight = max(_WEIGHT, 1 / self.steps)
        self.misses += weight * (misses - self.misses)
        sought = _GROWTH * prefetches + 1 if fell_short else prefetches
        self.prefetches += weight * (sought - self.prefetches)

    def wanted(
        self, *, slots: int, unused: int, absent: int, room: int, foresees: bool, wanted: int = 0,
        streamed: int | None = None,
    ) -> Provide:  # fmt: skip
        """What to set aside of `slots`, of which `unused` hold nothing: these cost nothing. `absent` experts are not
        resident, of which `wanted` are to be copied; steps can be handed `room` slots at most; prefetches are made if
        somebody `foresees`.

        `streamed`: for a prefill about to start, which streams what is absent through so many slots.
        """
        share = max(1, slots // MOST_SHARE)
        reserve = min(math.ceil(2 * self.prefetches) + 4, share) if foresees else 0
        reserve = min(max(reserve, streamed or 0) + wanted, absent)
        landing = max(min(math.ceil(2 * self.misses), share, slots - reserve), unused - reserve)
        return Provide(min(landing, absent, room), reserve, still=streamed is not None)
