"""What virtual mode holds on a device: experts that its ledger keeps, and the words by which kernels know of them.

Owner: the engine thread. `virtual` decides. An expert that is kept is in a slot from the boundary on that says so to
the kernels; what a step asked for is worked into the sets while the next one runs, some layers at each look.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_events import Keep, LetGo
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.held import HeldSets
from expertd_engine.experts.leases import ExpertUnavailableError
from expertd_engine.experts.residency import State
from expertd_engine.experts.swaps import Action, Hold
from expertd_engine.experts.virtual import VirtualExperts
from expertd_engine.experts.virtual_room import VirtualRoom

_LAYERS_AT_ONCE = 4
"""Between two looks at the running launch."""


class DeviceHeld(HeldSets):
    """Has `cache` keep what `sets` decides to hold."""

    def __init__(self, cache: DeviceCache, sets: VirtualExperts, room: VirtualRoom) -> None:
        super().__init__(sets, room)
        self._cache = cache
        self._was_open = False
        self._digesting: Iterator[None] = iter(())
        cache.meanwhile, cache.resizing, cache.resized = self._go_on, self._make_way, self._come_back

    @property
    def budget_bytes(self) -> int:
        ledger = self._cache.ledger
        return ledger.pool.limit * ledger.plan.slot_bytes

    def digest(self, asked: Iterable[NDArray[np.float32]], tokens: float) -> None:
        """A virtual step has ended; `asked`, `[experts]` by layer, is what its rows would have asked of each expert,
        `tokens` as for `end_step`. Taken in while the next step runs, or before the one after it."""
        self.finish()
        self._digesting = self._digest(asked, tokens)

    def finish(self) -> None:
        """Take in all that steps asked for."""
        for _ in self._digesting:
            pass

    def pump(self) -> None:
        self._take_in()

    def _digest(self, asked: Iterable[NDArray[np.float32]], tokens: float) -> Iterator[None]:
        for layer, sums in enumerate(asked):
            experts = np.flatnonzero(sums)
            self.sets.observe(layer, dict(zip(experts.tolist(), sums[experts].tolist(), strict=True)))
            if (layer + 1) % _LAYERS_AT_ONCE == 0:
                yield
        self.end_step(tokens)

    def _go_on(self) -> None:
        next(self._digesting, None)
        self._take_in()

    def _wait(self) -> None:
        """Raises ExpertUnavailableError where there is no slot for any of the wanted."""
        wanted = len(self._cache.ledger.wanted)
        self._cache.bring()
        if len(self._cache.ledger.wanted) == wanted:
            raise ExpertUnavailableError(f"no slot can be had for any of {wanted} experts that virtual mode needs")
        self._take_in()

    def _at_hand(self) -> Sequence[ExpertId]:
        slots = map(self._cache.ledger.resident_slots, range(len(self.room.experts)))
        return [ExpertId(layer, e) for layer, row in enumerate(slots) for e, slot in enumerate(row) if slot >= 0]

    def _take_in(self) -> None:
        while kept := self._cache.take_kept():
            self._carry_out([action for expert in kept for action in self.sets.arrived(expert)])

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            self._cache.keep(Keep(action.expert) if isinstance(action, Hold) else LetGo(action.expert))

    def _make_way(self) -> None:
        """The budget is about to change, and slots with it: nothing is held, nothing is on its way."""
        self.finish()
        self._was_open = self.sets.is_open
        self._carry_out(self.sets.stop())
        ledger = self._cache.ledger
        for expert in list(ledger.wanted):
            if ledger.state(expert) is State.ABSENT:
                self._cache.keep(LetGo(expert))
                self._carry_out(self.sets.failed(expert))
        self.settle()

    def _come_back(self) -> None:
        if self._was_open:
            self.fit(opening=True)
