"""The records of all experts and their legal transitions: absent → loading → resident ⇄ leased, and doomed.

Owner: the ledger, which decides when; here it is seen to that slots, byte sums, counters and the queue of experts that
may give way follow each transition. Pure.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from expertd_engine.experts.accounting import Counters, PrefetchOutcome, Slots, Story, slots_needed
from expertd_engine.experts.events import Cancel, ExpertId, Instruction, Load, Priority, Promote
from expertd_engine.experts.policy import Facts, Policy, Victims

EvictionReason = Literal["capacity", "budget_change"]

_TOLD_OF_LOAD = {Priority.DEMAND: "demand load", Priority.PREFETCH: "prefetch load"}
_TOLD_OF_EVICTION = {"capacity": "evicted for room from slot", "budget_change": "evicted for the budget from slot"}


class State(StrEnum):
    """Where a record is. `doomed`: its load was given up, but it may still write into its slot."""

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    LEASED = "leased"
    DOOMED = "doomed"


@dataclass(slots=True, eq=False)
class Record:
    """One expert. `place` is never LEASED: that is being resident with leases that do not wait in line."""

    expert: ExpertId
    nbytes: int
    facts: Facts
    place: State = State.ABSENT
    slot: int = -1
    load_id: int = -1
    priority: Priority = Priority.DEMAND
    leases: dict[int, None] = field(default_factory=dict)
    """Asked for and not ended, in order."""
    queued: bool = False
    """The leases wait in line; otherwise they are granted, or will be when the load ends."""
    failures: int = 0
    """Failed loads since the first of the leases was asked for."""
    hinted: int | None = None
    """Position of the hint that stands in the heap of hints; void unless it is still the soonest known use."""
    pending: bool = False
    """Prefetched, and not yet demanded or lost."""

    @property
    def state(self) -> State:
        leased = self.place is State.RESIDENT and self.leases and not self.queued
        return State.LEASED if leased else self.place


class Residency:
    """All records, the slots they are in, and their sums. Methods do one transition each and emit its instruction.

    `record_bytes`, `experts_per_layer` as in `Ledger`; `max_budget_bytes` is what slots are provided for.
    """

    def __init__(
        self,
        record_bytes: Sequence[int],
        experts_per_layer: Sequence[int],
        max_budget_bytes: int,
        policy: Policy,
        victims: Victims | None = None,
    ) -> None:
        self.records = {
            (expert := ExpertId(layer, index)): Record(expert, nbytes, Facts(expert))
            for layer, (nbytes, count) in enumerate(zip(record_bytes, experts_per_layer, strict=True))
            for index in range(count)
        }
        self.slots_by_layer = [array("q", [-1]) * count for count in experts_per_layer]
        """Slot of each resident expert, leased or not; -1 for the others."""
        self.num_slots = slots_needed([record.nbytes for record in self.records.values()], max_budget_bytes)
        self.slots = Slots(self.num_slots)
        self.victims = Victims(policy) if victims is None else victims
        """Facts of the idle experts: resident, not leased."""
        self.loads: dict[int, Record] = {}
        """In flight, by load id; doomed ones included."""
        self.prefetching: dict[ExpertId, Record] = {}
        """In flight, not doomed, held by no demand."""
        self.resident_bytes = self.idle_bytes = self.prefetching_bytes = self.doomed_bytes = 0
        layers = len(record_bytes)
        self.counters = Counters.of(layers)
        self.story = Story()
        self.out: list[Instruction] = []
        self.last_load = -1
        """Its number."""

    def record(self, expert: ExpertId) -> Record:
        """Raises LedgerError for an expert outside the model."""
        record = self.records.get(expert)
        if record is None:
            raise self.story.error(f"expert {tuple(expert)} is outside the model of {len(self.records)} experts")
        return record

    def held_bytes(self) -> int:
        """Bytes that only the end of a lease can free: leased, or loading on demand."""
        return self.slots.occupied - self.idle_bytes - self.prefetching_bytes - self.doomed_bytes

    # ------------------------------------------------------------ loads

    def load(self, record: Record, priority: Priority, limit: int) -> None:
        """absent → loading. There must be room within `limit` bytes."""
        record.slot = self.slots.take(record.nbytes, limit, self.out)
        if priority is Priority.PREFETCH:
            record.pending = True
            self.counters.prefetch_issued += 1
            self.counters.prefetch_pending += 1
            self.prefetching[record.expert] = record
            self.prefetching_bytes += record.nbytes
        self.issue_load(record, priority)

    def fill(self, record: Record, limit: int, priority: Priority = Priority.DEMAND) -> None:
        """absent → loading, though nothing asks for it. There must be room within `limit` bytes."""
        record.slot = self.slots.take(record.nbytes, limit, self.out)
        self.prefetching[record.expert] = record
        self.prefetching_bytes += record.nbytes
        self.issue_load(record, priority)

    def issue_load(self, record: Record, priority: Priority) -> None:
        """Start a load into the slot that the record has."""
        self.last_load += 1
        record.load_id = self.last_load
        record.place = State.LOADING
        record.priority = priority
        self.loads[record.load_id] = record
        self.story.tell(record.expert, _TOLD_OF_LOAD[priority], record.load_id)
        self.out.append(Load(record.load_id, record.expert, record.slot, priority))

    def end_load(self, load_id: int) -> Record:
        """The load is no longer in flight; what becomes of the record is the caller's to say."""
        record = self.loads.pop(load_id, None)
        if record is None:
            raise self.story.error(f"law 3: load {load_id} ended, but is not in flight")
        self.story.tell(record.expert, "end of load", load_id)
        if record.place is State.DOOMED:
            self.doomed_bytes -= record.nbytes
        elif record.expert in self.prefetching:
            self._leave_prefetching(record)
        return record

    def promote(self, record: Record) -> None:
        """A demand holds the load from now on."""
        if record.expert in self.prefetching:
            self._leave_prefetching(record)
            self.story.tell(record.expert, "promoted, load", record.load_id)
            self.out.append(Promote(record.load_id))

    def doom(self, record: Record) -> None:
        """loading → doomed."""
        if record.expert in self.prefetching:
            self._leave_prefetching(record)
        record.place = State.DOOMED
        self.doomed_bytes += record.nbytes
        self.story.tell(record.expert, "doomed, load", record.load_id)
        self.out.append(Cancel(record.load_id))

    def doom_prefetches(self, excess: int) -> None:
        """Give up prefetches, furthest needed first, until at least `excess` bytes will come free."""
        while excess > 0 and self.prefetching:
            record = max(self.prefetching.values(), key=_needed_at)
            self.doom(record)
            excess -= record.nbytes

    def settle_prefetch(self, record: Record, outcome: PrefetchOutcome) -> None:
        """If the record is a pending prefetch, this is what became of it."""
        if record.pending:
            record.pending = False
            self.counters.end_prefetch(outcome, record.nbytes)

    def _leave_prefetching(self, record: Record) -> None:
        del self.prefetching[record.expert]
        self.prefetching_bytes -= record.nbytes

    # ------------------------------------------------------------ residents

    def arrive(self, record: Record) -> None:
        """loading or doomed → resident: leased if its leases have waited for this, else idle."""
        record.place = State.RESIDENT
        self.slots_by_layer[record.expert.layer][record.expert.expert] = record.slot
        self.resident_bytes += record.nbytes
        if record.state is State.RESIDENT:
            self.set_idle(record)

    def relocate(self, record: Record, slot: int) -> None:
        """The resident record lies in another slot from now on; whose the slots are is the caller's to settle."""
        record.slot = slot
        self.slots_by_layer[record.expert.layer][record.expert.expert] = slot
        self.story.tell(record.expert, "moved to slot", slot)

    def set_idle(self, record: Record) -> None:
        """leased → resident."""
        self.idle_bytes += record.nbytes
        self.victims.offer(record.facts)

    def set_leased(self, record: Record) -> None:
        """resident → leased, if it was idle."""
        if record.facts.ticket:
            self.victims.withdraw(record.facts)
            self.idle_bytes -= record.nbytes

    def evict(self, facts: Facts, reason: EvictionReason) -> None:
        """resident → absent, for an expert just taken out of `victims`."""
        record = self.records[facts.expert]
        self.idle_bytes -= record.nbytes
        self.resident_bytes -= record.nbytes
        self.counters.evictions[reason] += 1
        self.story.tell(record.expert, _TOLD_OF_EVICTION[reason], record.slot)
        self.settle_prefetch(record, "wasted")
        self.slots_by_layer[record.expert.layer][record.expert.expert] = -1
        self.vacate(record)

    def vacate(self, record: Record) -> None:
        """The record is absent; its slot is free to be reused or dropped."""
        self.slots.vacate(record.slot)
        record.slot = -1
        record.place = State.ABSENT

    def give_slot(self, leaves: Record, comes: Record) -> None:
        """leased → absent, absent → loading: in the very slot, for records of one length whose leases have changed."""
        self.resident_bytes -= leaves.nbytes
        self.counters.evictions["capacity"] += 1
        self.story.tell(leaves.expert, "gave its place up, slot", leaves.slot)
        self.slots_by_layer[leaves.expert.layer][leaves.expert.expert] = -1
        comes.slot, leaves.slot, leaves.place = leaves.slot, -1, State.ABSENT
        self.issue_load(comes, Priority.DEMAND)

    # ------------------------------------------------------------ conservation laws

    def check(self) -> None:
        """Compare slots, sums and counters with the records. Raises LedgerError."""
        records = self.records.values()
        for record in records:
            self._check_record(record)
            layer, expert = record.expert
            if self.slots_by_layer[layer][expert] != (record.slot if record.place is State.RESIDENT else -1):
                raise self.story.error("law 2: the table of resident slots is wrong", record.expert)
        self.slots.check(self._owned_slots(), self.story)
        in_flight = [r for r in records if r.place in (State.LOADING, State.DOOMED)]
        sums = {
            "resident bytes": (self.resident_bytes, _bytes(r for r in records if r.place is State.RESIDENT)),
            "loading bytes": (self.slots.occupied - self.resident_bytes, _bytes(in_flight)),
            "doomed bytes": (self.doomed_bytes, _bytes(r for r in records if r.place is State.DOOMED)),
            "idle bytes": (self.idle_bytes, _bytes(r for r in records if r.state is State.RESIDENT)),
            "prefetching bytes": (self.prefetching_bytes, _bytes(self.prefetching.values())),
            "loads in flight": (len(self.loads), len(in_flight)),
            "prefetches pending": (self.counters.prefetch_pending, sum(r.pending for r in records)),
            "prefetches issued": (self.counters.prefetch_issued, self.counters.prefetch_ended_or_pending()),
        }
        for name, (counted, real) in sums.items():
            if counted != real:
                raise self.story.error(f"law 6: {name}: counted {counted}, but there are {real}")

    def _owned_slots(self) -> dict[int, int]:
        owned: dict[int, int] = {}
        for record in self.records.values():
            if record.slot in owned:
                raise self.story.error(f"law 3: slot {record.slot} has two owners", record.expert)
            if record.slot >= 0:
                owned[record.slot] = record.nbytes
        return owned

    def _check_record(self, record: Record) -> None:
        place, in_flight = record.place, record.place in (State.LOADING, State.DOOMED)
        held = bool(record.leases) and not record.queued
        problems = {
            "law 2: may be evicted though not idle, or is idle and may not":
                bool(record.facts.ticket) is not (record.state is State.RESIDENT),
            "law 3: is absent with a slot, or elsewhere without": (record.slot < 0) is not (place is State.ABSENT),
            "law 3: is not what its load is for": in_flight and self.loads.get(record.load_id) is not record,
            "law 3: has leases that nobody serves": held and place in (State.ABSENT, State.DOOMED),
            "law 4: is held by nobody or a prefetch, and not both":
                place is State.LOADING and held is (record.expert in self.prefetching),
        }  # fmt: skip
        for problem, holds in problems.items():
            if holds:
                raise self.story.error(f"{problem}: expert {tuple(record.expert)}", record.expert)


def _needed_at(record: Record) -> float:
    return math.inf if record.facts.next_use is None else record.facts.next_use


def _bytes(records: Iterable[Record]) -> int:
    return sum(record.nbytes for record in records)
