"""What every residency ledger is made of, whatever its laws: records, what is foreseen of them, and a budget. Pure.

Here are the questions that can be asked of a ledger at any time; what changes it is `Ledger`'s and `DeviceLedger`'s.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from expertd_engine.errors import BudgetError, ResourceError
from expertd_engine.experts.accounting import Counters
from expertd_engine.experts.events import ExpertId, PastUse, Remember
from expertd_engine.experts.foresight import Foresight
from expertd_engine.experts.policy import Policy, Victims, weight_from_now
from expertd_engine.experts.residency import Residency, State


class LedgerBase:
    """Parameters as of `Ledger` and `DeviceLedger`. Raises BudgetError and ResourceError for a budget out of bounds."""

    def __init__(
        self,
        record_bytes: Sequence[int],
        experts_per_layer: Sequence[int],
        policy: Policy,
        victims: Victims | None = None,
        *,
        minimum_bytes: int,
        budget_bytes: int,
        max_budget_bytes: int | None,
        prefetch: bool,
        prefetch_depth: int,
    ) -> None:
        self.experts_per_layer = tuple(experts_per_layer)
        self.minimum_bytes = minimum_bytes
        self.max_budget_bytes = budget_bytes if max_budget_bytes is None else max_budget_bytes
        self.budget_bytes = self._checked_budget(budget_bytes)
        self._policy = policy
        self._residency = Residency(record_bytes, experts_per_layer, self.max_budget_bytes, policy, victims)
        self._foresight = Foresight(self._residency, policy, prefetch)
        self._prefetch_depth = prefetch_depth

    @property
    def counters(self) -> Counters:
        return self._residency.counters

    @property
    def resident_bytes(self) -> int:
        """Bytes of resident records, leased ones included."""
        return self._residency.resident_bytes

    @property
    def loading_bytes(self) -> int:
        """Bytes of records whose load is in flight, doomed ones included."""
        return self._residency.slots.occupied - self._residency.resident_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes ever charged at one instant."""
        return self._residency.slots.peak

    def resident_slots(self, layer: int) -> array[int]:
        """The slot of each expert of a layer, -1 where it is not resident: always up to date, for reading alone."""
        return self._residency.slots_by_layer[layer]

    def residents_by_layer(self) -> list[int]:
        """Number of resident experts (leased ones included) of each MoE layer."""
        return [sum(slot >= 0 for slot in slots) for slots in self._residency.slots_by_layer]

    def absent_for(self, expert: ExpertId) -> int | None:
        """Lookups since the last use of an absent expert; None for one that is resident or on its way."""
        record = self._residency.records[expert]
        return self._foresight.lookups - record.facts.last_use if record.place is State.ABSENT else None

    def state(self, expert: ExpertId) -> State:
        """Raises LedgerError for an expert outside the model."""
        return self._residency.record(expert).state

    def recollection(self) -> Remember:
        """What a later engine may want to know: `Remember`."""
        now, records = self._foresight.lookups, self._residency.records.values()
        uses = tuple(
            PastUse(r.expert, r.facts.last_use - now - 1, weight_from_now(self._policy, r.facts, now))
            for r in records
            if r.facts.last_use != -1
        )
        residents = [r for r in records if r.place is State.RESIDENT]
        best = sorted(residents, key=lambda r: (not r.facts.probation, self._policy.rank(r.facts), r.facts.last_use))
        return Remember(uses, tuple(r.expert for r in reversed(best)))

    def check(self) -> None:
        """Verify all that must hold between events, in O(experts). Raises LedgerError with the story of who erred."""
        self._residency.check()
        if self.counters.lookups() != self._foresight.lookups:
            raise self._residency.story.error(f"law 6: {self.counters} of {self._foresight.lookups} lookups")

    def _recall_uses(self, event: Remember) -> None:
        """Know of experts' uses what an earlier ledger knew. Only before the first lookup."""
        if self._foresight.lookups:
            raise self._residency.story.error("an earlier engine is remembered after the first lookup")
        for use in event.uses:
            facts = self._residency.record(use.expert).facts
            facts.last_use, facts.weight = use.last_use, use.weight

    def _adapt(self, slots: int) -> None:
        """The policy may rank otherwise from now on, in a cache of so many slots."""
        known = (record.facts for record in self._residency.records.values())
        if self._policy.adapt(self._foresight.lookups, slots, known):
            self._residency.victims.rank_anew()

    def _checked_budget(self, budget_bytes: int) -> int:
        if budget_bytes < self.minimum_bytes:
            raise BudgetError("expert budget", budget_bytes, self.minimum_bytes, "one slot computing, one loading")
        if budget_bytes > self.max_budget_bytes:
            raise ResourceError(
                f"expert budget of {budget_bytes} bytes is above the {self.max_budget_bytes} bytes reserved at start"
            )
        return budget_bytes
