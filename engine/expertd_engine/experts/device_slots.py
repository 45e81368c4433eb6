"""The slots of a device's ledger: which are set aside, who gives way, who is kept, and what a budget leaves. Pure.

Owner: the engine thread, through `DeviceLedger`, whose laws these are; here nothing is known of steps and hints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expertd_engine.experts.device_events import (
    Adopt,
    Confine,
    Cooled,
    DeviceInstruction,
    Hand,
    Keep,
    Kept,
    Lend,
    Lent,
    LetGo,
    Move,
    Provide,
    Recall,
    Retire,
)
from expertd_engine.experts.device_pool import ChunkPlan, SlotPool, Use
from expertd_engine.experts.device_uses import Uses
from expertd_engine.experts.events import ExpertId, Priority, SetBudget
from expertd_engine.experts.ledger_base import LedgerBase
from expertd_engine.experts.policy import Policy
from expertd_engine.experts.residency import EvictionReason, State

_KEPT = -1
"""The one lease that there is on a device: a kept expert's, however long."""


class SlotLedger(LedgerBase):
    """Parameters as of `DeviceLedger`. Raises BudgetError for a budget below the minimum."""

    def __init__(
        self,
        record_bytes: Sequence[int],
        experts_per_layer: Sequence[int],
        plan: ChunkPlan,
        budget_bytes: int,
        policy: Policy,
        max_budget_bytes: int | None,
        prefetch: bool,
        prefetch_depth: int,
        uses: Uses,
    ) -> None:
        experts = sum(experts_per_layer)
        if not record_bytes or max(record_bytes) > plan.slot_bytes or min(*experts_per_layer, prefetch_depth) < 1:
            raise ValueError(f"no slots of {plan.slot_bytes} bytes for {experts} experts of {list(record_bytes)} bytes")
        super().__init__(
            record_bytes, experts_per_layer, policy, uses.victims, minimum_bytes=plan.bytes_of(min(2, experts)),
            budget_bytes=budget_bytes, max_budget_bytes=max_budget_bytes, prefetch=prefetch,
            prefetch_depth=prefetch_depth,
        )  # fmt: skip
        for record, facts in zip(self._residency.records.values(), uses.facts, strict=True):
            record.facts = facts
        self._uses = uses
        self.plan = plan
        self.num_slots = min(experts, plan.slots_within(self.max_budget_bytes))
        self.pool = SlotPool(self.num_slots, plan.slot_bytes, self.slots_within(budget_bytes))
        self._residency.slots = self.pool
        self._still = False
        """The budget changes: nothing is copied until what was retired has cooled."""
        self.kept: set[ExpertId] = set()
        self.wanted: dict[ExpertId, None] = {}
        """To be kept, and not there yet."""
        self._out: list[DeviceInstruction] = []

    @property
    def limit_bytes(self) -> int:
        """What charged bytes may not exceed now (law 1)."""
        return self.budget_bytes

    def check(self) -> None:
        """As `LedgerBase.check`, and law 1."""
        super().check()
        if self.pool.charged > self.budget_bytes:
            raise self._residency.story.error(f"law 1: {self.pool.charged} charged of {self.budget_bytes}")

    # ------------------------------------------------------------ what is kept

    @property
    def lacking(self) -> int:
        """How many of the wanted no copy is under way for."""
        return sum(self._residency.records[expert].place is State.ABSENT for expert in self.wanted)

    def _keep(self, event: Keep) -> None:
        expert = self._residency.record(event.expert).expert
        if expert in self.wanted or expert in self.kept:
            raise self._residency.story.error("law 3: the expert is kept already", expert)
        self.wanted[expert] = None

    def _let_go(self, event: LetGo) -> None:
        record = self._residency.record(event.expert)
        is_kept, is_wanted = record.expert in self.kept, record.expert in self.wanted
        if not is_kept and (record.leases or not is_wanted):
            raise self._residency.story.error("law 3: the expert is let go, but is not kept", record.expert)
        self.wanted.pop(record.expert, None)
        self.kept.discard(record.expert)
        if record.leases.pop(_KEPT, False) is None:
            self._residency.set_idle(record)

    def _serve_wanted(self) -> None:
        """Who is there is kept; copies begin for the others, as far as slots may be written now."""
        for expert in list(self.wanted):
            record = self._residency.records[expert]
            if record.place is State.ABSENT and not self._still and self.pool.first(Use.COLD, Use.FREE) is not None:
                record.leases[_KEPT] = None
                self._residency.load(record, Priority.DEMAND, self.budget_bytes)
            elif record.place is State.LOADING:
                record.leases[_KEPT] = None
                self._residency.promote(record)
            elif record.place is State.RESIDENT:
                record.leases[_KEPT] = None
                self._residency.set_leased(record)
                del self.wanted[expert]
                self.kept.add(expert)
                self._out.append(Kept(expert))

    # ------------------------------------------------------------ slots

    def _lend(self, event: Lend) -> None:
        lent = [*self.pool.slots(Use.COLD), *self.pool.slots(Use.FREE)][: event.most]
        for slot in lent:
            self.pool.put(slot, Use.LENT)
        self._out.append(Lent(lent))

    def _adopt(self, event: Adopt) -> None:
        record = self._residency.record(event.expert)
        if record.place is State.ABSENT:
            self.pool.own(event.slot, record.nbytes)
            record.slot = event.slot
            self._residency.story.tell(record.expert, "adopted in slot", event.slot)
            self._residency.arrive(record)

    def take_back(self, lent: Iterable[int]) -> None:
        """Nothing that was launched before the next copy reads these slots any more; those adopted stay."""
        for slot in lent:
            if self.pool.use(slot) is Use.LENT:
                self.pool.put(slot, Use.COLD)

    def _cooled(self, event: Cooled) -> None:
        self._still = False
        for slot in event.slots:
            if self.pool.use(slot) is Use.COOLING:
                self.pool.put(slot, Use.COLD)
            elif self.pool.use(slot) is not Use.GONE:
                raise self._residency.story.error(
                    f"law 2: slot {slot} cooled, but is {self.pool.use(slot).name.lower()}"
                )

    def _provide(self, event: Provide) -> None:
        """Evicts where no slot is empty."""
        pool = self.pool
        if event.still and pool.number(Use.HANDED) > event.landing:
            self._recall()
        while pool.number(Use.HANDED) < event.landing:
            spare = pool.number(Use.COLD, Use.COOLING, Use.FREE) > event.reserve
            slot = pool.first(Use.FREE, Use.COOLING, Use.COLD) if spare else self._evict("capacity")
            if slot is None:
                break
            pool.put(slot, Use.HANDED)
            self._out.append(Hand(slot))
        for _ in range(event.reserve - pool.number(Use.COLD, Use.COOLING, Use.FREE)):
            if self._evict("capacity") is None:
                break

    def _evict(self, reason: EvictionReason) -> int | None:
        """The slot of whoever gives way first; None if nobody may."""
        if not len(self._residency.victims):
            return None
        facts = self._residency.victims.take()
        slot = self._residency.records[facts.expert].slot
        self._residency.evict(facts, reason)
        self._out.append(Retire(slot, facts.expert))
        return slot

    # ------------------------------------------------------------ the budget

    def slots_within(self, budget_bytes: int) -> int:
        """Slots of a budget."""
        return min(self.num_slots, self.plan.slots_within(budget_bytes))

    def _set_budget(self, event: SetBudget) -> None:
        budget = self._checked_budget(event.budget_bytes)
        if self.slots_within(budget) < self.pool.limit:
            raise self._residency.story.error("law 1: the budget is lowered before its slots are given up")
        self.budget_bytes = budget
        self.pool.set_limit(self.slots_within(budget))

    def _confine(self, event: Confine) -> None:
        if self._residency.loads or self.pool.number(Use.LENT):
            raise self._residency.story.error("law 1: slots are given up while copies are in flight")
        self._still = True
        self._recall()
        while self.pool.number(Use.OWNED) > event.slots:
            if self._evict("budget_change") is None:
                raise self._residency.story.error(f"law 1: {len(self.kept)} are kept, and {event.slots} slots are left")
        self._compact(event.slots)
        self.pool.set_limit(event.slots)

    def _recall(self) -> None:
        handed = self.pool.slots(Use.HANDED)
        for slot in handed:
            self.pool.put(slot, Use.COOLING)
        if handed:
            self._out.append(Recall(tuple(handed)))

    def _compact(self, limit: int) -> None:
        """Move residents out of the slots from `limit` on."""
        records = (r for r in self._residency.records.values() if r.slot >= limit)
        below = (s for use in (Use.FREE, Use.COLD, Use.COOLING) for s in self.pool.slots(use) if s < limit)
        for record, slot in zip(records, below, strict=False):
            origin = record.slot
            self.pool.vacate(origin)
            self.pool.own(slot, record.nbytes)
            self._residency.relocate(record, slot)
            self._out.append(Move(record.expert, origin, slot))

    def check_budget(self, budget_bytes: int) -> None:
        """Raises as `SetBudget` would."""
        self._checked_budget(budget_bytes)
