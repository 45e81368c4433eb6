"""Who each layer holds, and in which slots, as native code reads it while it runs layer after layer.

Written by the engine thread between calls. While a call runs, the thread that has read a record which was `expected`
adds it: so what is foreseen as a step begins serves in that step. Nothing is taken away but between calls: experts in
the table are leased, and their leases end on the engine thread.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.events import ExpertId, Load


class HeldTable:
    """`experts[l]`: how many layer l has. `masks[l]` `[E]` says who is held, `slots[l]` `[E]` where: always the same
    memory."""

    def __init__(self, experts: Sequence[int]) -> None:
        self.masks: list[NDArray[np.bool_]] = [np.zeros(count, bool) for count in experts]
        self.shown: list[NDArray[np.bool_]] = [np.zeros(count, bool) for count in experts]
        """As `masks`, but for who has arrived since."""
        self.slots: list[NDArray[np.int64]] = [np.full(count, -1, np.int64) for count in experts]
        self._expected: set[ExpertId] = set()

    def show(self, layer: int, held: Collection[int], slots: Sequence[int]) -> None:
        """The layer holds these experts; `slots` are of all."""
        indices = list(held)
        shown = self.shown[layer]
        shown[:] = False
        shown[indices] = True
        self.slots[layer][indices] = [slots[index] for index in indices]
        self.masks[layer][:] = shown

    def expect(self, expert: ExpertId) -> None:
        """A lease on it has been asked for, and lasts: it may be used as soon as it is there."""
        self._expected.add(expert)

    def forget(self, expert: ExpertId) -> None:
        """The lease has been granted or denied."""
        self._expected.discard(expert)

    def loaded(self, load: Load) -> None:
        """Its record is in its slot; called by the thread that has read it, before anybody else knows."""
        if load.expert in self._expected:
            layer, expert = load.expert
            self.slots[layer][expert] = load.slot
            self.masks[layer][expert] = True  # last: a reader that sees this sees the slot and the record
