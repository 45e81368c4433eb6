"""The thin shell around virtual experts: long leases on what is held, inside the room that the budget leaves them.

Owner: the engine thread. `virtual` decides, a residency ledger grants; a held expert is a leased one, so nothing can
evict it, and whatever else wants experts has the rest of the budget. `HeldSets` is what every ledger has in common.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from expertd_engine.errors import BudgetError
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.events import Demand, Event, ExpertId, Release
from expertd_engine.experts.held_table import HeldTable
from expertd_engine.experts.leases import ExpertUnavailableError, Lease
from expertd_engine.experts.ledger import State
from expertd_engine.experts.swap_choice import CANDIDATES, Floats, SwapChooser, most_expected
from expertd_engine.experts.swaps import Action, Hold, Swap
from expertd_engine.experts.virtual import VirtualExperts
from expertd_engine.experts.virtual_room import VirtualRoom
from expertd_engine.kernels.library import Library

IDLE_STEPS = 256
"""Exact steps in a row after which held experts are given back."""


class HeldSets(ABC):
    """When the sets open, how large they are, when they close."""

    def __init__(self, sets: VirtualExperts, room: VirtualRoom) -> None:
        self.sets = sets
        self.room = room
        self._idle_steps = 0

    # ------------------------------------------------------------ what a ledger does

    @property
    @abstractmethod
    def budget_bytes(self) -> int:
        """The expert budget."""

    @abstractmethod
    def pump(self) -> None:
        """Take in what has been loaded."""

    @abstractmethod
    def _wait(self) -> None:
        """Until something that is on its way has ended, and take it in."""

    @abstractmethod
    def _carry_out(self, actions: Sequence[Action]) -> None:
        """What comes of one action is taken in after the last: the others were decided before it."""

    @abstractmethod
    def _take_in(self) -> None:
        """Tell `sets` of loads that have ended, and do what follows, until nothing does."""

    @abstractmethod
    def _at_hand(self) -> Sequence[ExpertId]:
        """Experts in memory that may be held at once."""

    # ------------------------------------------------------------ steps

    def begin_step(self) -> bool:
        """A virtual step begins. Waits until every layer holds enough for a token, as it does but when sets open.

        False where the budget is too small for that now: the step has to be computed exactly. Raises
        ExpertUnavailableError if not even so many experts can be loaded.
        """
        self._idle_steps = 0
        if not self.sets.is_open:
            self.fit(opening=True)
        self.pump()
        while self.sets.is_open and not self.sets.is_ready:
            if self.sets.is_settled:
                raise ExpertUnavailableError(f"virtual mode needs {self.sets.top_k} experts a layer: not as many load")
            self._wait()
        return self.sets.is_open

    def foresee(self, layer: int, expected: Mapping[int, float]) -> None:
        """As `VirtualExperts.foresee`."""
        if self.sets.is_open:
            self._carry_out(self.sets.foresee(layer, expected))
            self._take_in()

    def end_step(self, tokens: float) -> None:
        """The virtual step has ended; `tokens` as for `VirtualExperts.end_step`."""
        if self.sets.is_open:
            self._carry_out(self.sets.end_step(tokens))
            self._take_in()

    def exact_step(self) -> None:
        """A step of the other mode has run: after many of them the sets go."""
        self._idle_steps += 1
        if self.sets.is_open:
            self._take_in()
            if self._idle_steps >= IDLE_STEPS:
                self._carry_out(self.sets.stop())

    def settle(self) -> None:
        """Wait until nothing is on its way."""
        self.pump()
        while not self.sets.is_settled:
            self._wait()

    def close(self) -> None:
        """Give everything back, what is on its way too."""
        self._carry_out(self.sets.stop())
        self.settle()

    # ------------------------------------------------------------ the budget

    def refusal(self) -> str | None:
        """Why virtual mode cannot be had in the present budget."""
        budget = self.budget_bytes
        if self.room.slots(budget) is not None:
            return None
        what = f"{self.sets.top_k} slots in each of {len(self.room.experts)} MoE layers and two to load through"
        return str(BudgetError("expert budget for virtual mode", budget, self.room.minimum_bytes, what))

    def fit(self, *, opening: bool = False) -> None:
        """Make the sets as large as the budget lets them be, if there are any or they are `opening`."""
        if not opening and not self.sets.is_open:
            return
        slots = self.room.slots(self.budget_bytes)
        if slots is None:
            self._carry_out(self.sets.stop())
        else:
            self._carry_out(self.sets.resize(slots, self._at_hand()))
        self._take_in()


class HeldExperts(HeldSets):
    """Leases from `cache` what `sets` decides to hold."""

    def __init__(
        self, cache: ExpertCache, sets: VirtualExperts, room: VirtualRoom, library: Library | None = None
    ) -> None:
        """`library` chooses swaps; without, Python does."""
        super().__init__(sets, room)
        self.library = library
        self.granted: list[Lease] = []
        """Not yet told to `sets`."""
        self._denied: list[tuple[Lease, str]] = []
        self.cache = cache
        self.table = HeldTable(room.experts)
        self._chooser = None if library is None else SwapChooser(library, sets, self.table)
        self._held: dict[ExpertId, Lease] = {}
        self._acting = False
        cache.resized = self.fit
        cache.handled = self._after_handling
        cache.transfers.loaded = self.table.loaded

    @property
    def budget_bytes(self) -> int:
        return self.cache.ledger.budget_bytes

    def slots(self, layer: int, experts: Sequence[int], pairs: Sequence[int]) -> list[int] | None:
        """The slots of experts that `pairs` (token, choice) pairs of the step each use, where all are held; they stay
        until what this method's caller does next is done: nobody takes events in meanwhile. None where one is not."""
        if not self.sets.holds(layer, experts):
            return None
        self.cache.served([(layer, len(experts), sum(pairs))])
        resident = self.cache.ledger.resident_slots(layer)
        return [resident[expert] for expert in experts]

    def pump(self) -> None:
        self.cache.pump()
        self._take_in()

    def bring(self, expected: Floats) -> None:
        """A step begins that will probably give experts these shares, `[L, widest E]`, of their layers' weight."""
        if not self.sets.is_open:
            return
        if self._chooser is not None and self.sets.is_plain:
            swaps = self.sets.exchange(self._chooser(expected))
        else:
            wanted = most_expected(expected, self.table.taken, CANDIDATES * self.sets.limits.foreseen)
            swaps = self.sets.bring(wanted, lambda layer: expected[layer].tolist())
        if swaps:
            self._exchange(swaps)
            self._take_in()

    def _wait(self) -> None:
        self.cache.wait()
        self._take_in()

    def _at_hand(self) -> Sequence[ExpertId]:
        ledger = self.cache.ledger
        counts = enumerate(ledger.experts_per_layer)
        experts = (ExpertId(layer, index) for layer, count in counts for index in range(count))
        return [expert for expert in experts if ledger.state(expert) is State.RESIDENT]

    # ------------------------------------------------------------ leases

    def denied(self, lease: Lease, reason: str) -> None:
        """The ledger has ended the lease, in the midst of what else it has to say."""
        self._denied.append((lease, reason))

    def _after_handling(self) -> None:
        """What arrived for sets that have shrunk meanwhile holds room that a step may be waiting for."""
        if not self._acting and (self.granted or self._denied):
            self._take_in()

    def _take_in(self) -> None:
        while self.granted or self._denied:
            granted, self.granted = self.granted, []
            denied, self._denied = self._denied, []
            actions: list[Action] = []
            for lease in granted:
                self.table.granted(lease.expert, lease.slot)
                self._held[lease.expert] = lease
                actions += self.sets.arrived(lease.expert)
            for lease, _ in denied:
                self.table.gone(lease.expert)
                actions += self.sets.failed(lease.expert)
            self._carry_out(actions)

    def _carry_out(self, actions: Sequence[Action]) -> None:
        if not actions:
            return
        was, self._acting = self._acting, True
        self.cache.handle([self._event(action) for action in actions])
        self._acting = was

    def _exchange(self, swaps: Sequence[Swap]) -> None:
        was, self._acting = self._acting, True
        self.cache.handle([self._exchanged(swap.newcomer, swap.victim) for swap in swaps])
        self._acting = was

    def _exchanged(self, newcomer: ExpertId, victim: ExpertId) -> Event:
        self.table.gone(victim)
        self.table.expect(newcomer)
        return self.cache.exchange(self._held.pop(victim), newcomer, self)

    def _event(self, action: Action) -> Event:
        if isinstance(action, Hold):
            return self._demand(action.expert)
        lease = self._held.pop(action.expert)
        self.table.gone(action.expert)
        self.cache.forget([lease.lease_id])
        return Release(lease.lease_id)

    def _demand(self, expert: ExpertId) -> Demand:
        demand = self.cache.demand(expert, scan=False, pairs=0)
        self.cache.remember(Lease(demand.lease_id, 0, expert, self))
        self.table.expect(expert)
        return demand
