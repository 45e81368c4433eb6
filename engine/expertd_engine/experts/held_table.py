"""Who each layer holds, and in which slots, as native code reads it while it runs layer after layer.

Written by the engine thread between calls. While a call runs, the thread that has read a record which was `expected`
adds it: so what is foreseen as a step begins serves in that step. Nothing is taken away but between calls: experts in
the table are leased, and their leases end on the engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.events import ExpertId, Load

Bools: TypeAlias = NDArray[np.bool_]


class HeldTable:
    """`experts[l]`: how many layer l has. `masks[l]` `[E]` says who is held, `slots[l]` `[E]` where: always the same
    memory, rows of `held` `[L, widest E]` and of one like it."""

    def __init__(self, experts: Sequence[int]) -> None:
        shape = len(experts), max(experts)
        self.held: Bools = np.zeros(shape, bool)
        """And who has arrived since."""
        self.told: Bools = np.zeros(shape, bool)
        """Who is held, but for who has arrived since."""
        self.taken: Bools = np.zeros(shape, bool)
        """Who is held or expected."""
        slots = np.full(shape, -1, np.int64)
        self.masks: list[Bools] = [row[:count] for row, count in zip(self.held, experts, strict=True)]
        self.shown: list[Bools] = [row[:count] for row, count in zip(self.told, experts, strict=True)]
        """As `masks`, but for who has arrived since."""
        self.slots = [row[:count] for row, count in zip(slots, experts, strict=True)]
        self._width = shape[1]
        self._expected: set[ExpertId] = set()
        # The same memory once more: to set one number takes numpy as long as to set thirty so.
        self._held, self._told, self._taken = (one.data.cast("B") for one in (self.held, self.told, self.taken))
        self._slots = slots.data.cast("B").cast("q")

    def expect(self, expert: ExpertId) -> None:
        """A lease on it has been asked for, and lasts: it may be used as soon as it is there."""
        self._expected.add(expert)
        self._taken[expert.layer * self._width + expert.expert] = 1

    def granted(self, expert: ExpertId, slot: int) -> None:
        """It is held in this slot."""
        self._expected.discard(expert)
        at = expert.layer * self._width + expert.expert
        self._slots[at] = slot
        self._held[at] = self._told[at] = self._taken[at] = 1

    def gone(self, expert: ExpertId) -> None:
        """It is held no more, or its lease has been denied."""
        self._expected.discard(expert)
        at = expert.layer * self._width + expert.expert
        self._held[at] = self._told[at] = self._taken[at] = 0

    def loaded(self, load: Load) -> None:
        """Its record is in its slot; called by the thread that has read it, before anybody else knows."""
        if load.expert in self._expected:
            at = load.expert.layer * self._width + load.expert.expert
            self._slots[at] = load.slot
            self._held[at] = 1  # last: a reader that sees this sees the slot and the record
