"""What virtual mode holds on a device: experts that its ledger keeps, and the words by which kernels know of them.

Owner: the engine thread. `virtual` decides. An expert that is kept is in a slot from the boundary on that says so to
the kernels; what a step asked for is worked into the sets while the next one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_events import Keep, LetGo
from expertd_engine.experts.device_pool import Use
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.held import HeldSets
from expertd_engine.experts.held_ranks import HeldRanks
from expertd_engine.experts.leases import ExpertUnavailableError
from expertd_engine.experts.residency import State
from expertd_engine.experts.swaps import Action, Hold
from expertd_engine.experts.virtual import VirtualExperts
from expertd_engine.experts.virtual_room import VirtualRoom


class DeviceHeld(HeldSets):
    """Has `cache` keep what `sets` decides to hold."""

    def __init__(self, cache: DeviceCache, sets: VirtualExperts, room: VirtualRoom) -> None:
        super().__init__(sets, room)
        self._cache = cache
        self._ranks = HeldRanks(sets)
        self._was_open = False
        self._serves = False
        """Every layer holds enough for a token; once that is so it stays so, until sets are made anew."""
        self._digesting: Iterator[None] = iter(())
        cache.meanwhile, cache.resizing, cache.resized = self._go_on, self._make_way, self._come_back

    @property
    def budget_bytes(self) -> int:
        ledger = self._cache.ledger
        return ledger.pool.limit * ledger.plan.slot_bytes

    def begin_step(self) -> bool:
        """As `HeldSets.begin_step`; the device stands still meanwhile."""
        if self._idle_steps or not (self._serves and self.sets.is_open):
            self._serves = super().begin_step()
        if self._serves and self._waits_for_nobody():
            self._cache.bring()
            self._take_in()
        return self._serves

    @property
    def may_go_ahead(self) -> bool:
        """Whether `begin_step` would wait for nothing, and so may be called while a step runs still."""
        return self._serves and self.sets.is_open and not self._idle_steps and not self._waits_for_nobody()

    def digest(self, asked: Callable[[], NDArray[np.float32]], tokens: float) -> None:
        """A virtual step has ended; `asked()`, `[layers, experts]`, is what its rows would have asked of each expert,
        `tokens` as for `end_step`. Taken in while the next step runs, or before the one after it."""
        self.finish()
        self._digesting = self._digest(asked, tokens)

    def finish(self) -> None:
        """Take in all that steps asked for."""
        for _ in self._digesting:
            pass

    def pump(self) -> None:
        self._take_in()

    def _digest(self, asked: Callable[[], NDArray[np.float32]], tokens: float) -> Iterator[None]:
        self._ranks.observe(asked())
        yield
        self._ranks.seek()
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

    def _waits_for_nobody(self) -> bool:
        """Whether newcomers wait for slots that nobody gives up: all are kept or handed to steps, which miss nothing
        any more and so never use them; only what stands still can take them back."""
        ledger = self._cache.ledger
        number = ledger.pool.number
        return (
            bool(ledger.wanted and number(Use.HANDED)) and ledger.is_idle() and ledger.lacking > 0
            and not number(Use.COLD, Use.COOLING, Use.FREE) and number(Use.OWNED) == len(ledger.kept)
        )  # fmt: skip

    def _at_hand(self) -> Sequence[ExpertId]:
        slots = map(self._cache.ledger.resident_slots, range(len(self.room.experts)))
        return [ExpertId(layer, e) for layer, row in enumerate(slots) for e, slot in enumerate(row) if slot >= 0]

    def _take_in(self) -> None:
        while kept := self._cache.take_kept():
            self._carry_out([action for expert in kept for action in self.sets.arrived(expert)])

    def _carry_out(self, actions: Sequence[Action]) -> None:
        if actions:
            self._cache.keep(*(Keep(a.expert) if isinstance(a, Hold) else LetGo(a.expert) for a in actions))

    def _make_way(self) -> None:
        """The budget is about to change, and slots with it: nothing is held, nothing is on its way."""
        self.finish()
        self._serves, self._was_open = False, self.sets.is_open
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
