"""The residency ledger: which expert is in which slot, who holds it, and what is on its way. A pure state machine.

Owner: the engine thread; whoever carries out the instructions owns nothing. Laws (numbers as in the error messages):

1. charged bytes ≤ limit at every instant, between two instructions too; the limit is the budget, or, after the budget
   was lowered below what leases hold, what is still charged: it falls as they end, and meanwhile no load is issued
   but the second try of a failed one, in its own slot, and one for the first demand in line, within the old limit,
   where it would otherwise wait for ever. Charged are, for each slot, the most bytes written since it was last dropped; at the end of an event that is the
   sum of the records resident, loading and doomed.
2. A leased expert is never evicted.
3. One owner for each slot, at most one load in flight for each expert, and a lease ends once.
4. Demands overtake prefetches. A prefetch is issued only while no demand waits and is given up when a demand needs its
   room; it evicts only an expert with no known use up to the prefetched one's. (Were *all* that the current and the
   next step need protected, a model whose every step uses every expert could never prefetch: there, the order of
   the uses inside a step is what is worth knowing.)
5. Experts brought in by prompt tokens alone are the first to go, and such uses do not refresh the others' recency; a
   use by a decoding token takes an expert into the working set.
6. The counters equal the ledger.

Demands that cannot be placed wait in the order they were asked. A later demand that would take the last room for the
first in line (of an idle resident, or of a prefetch under way, when records differ in length) waits behind it, so a
consumer that uses and releases its leases in the order it asked for them always comes to an end. Every operation is
O(log n) amortised, but `Tick` (once a step), `check` and `residents_by_layer`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import heappop, heappush
from typing import Any

from expertd_engine.errors import BudgetError, ResourceError
from expertd_engine.experts.accounting import Counters, LedgerError, PrefetchOutcome, Slots, Story, slots_needed
from expertd_engine.experts.events import (
    Abort,
    Cancel,
    Cancelled,
    Demand,
    Denied,
    Event,
    ExpertId,
    Failed,
    Granted,
    Instruction,
    Load,
    Loaded,
    LookupResult,
    Predict,
    Priority,
    Promote,
    Release,
    SetBudget,
    Tick,
)
from expertd_engine.experts.policy import Facts, Policy, Victims

__all__ = ["Ledger", "LedgerError", "State"]

_LOADS = {Priority.DEMAND: "demand load", Priority.PREFETCH: "prefetch load"}

_EVICTIONS = {"capacity": "evicted for room from slot", "budget_change": "evicted for the budget from slot"}

ATTEMPTS = 2
"""Loads tried for a demanded record before its leases are denied."""


class State(StrEnum):
    """Where a record is. `doomed`: its load was given up, but it may still write into its slot."""

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    LEASED = "leased"
    DOOMED = "doomed"


@dataclass(slots=True, eq=False)
class _Record:
    """One expert. A record in `Ledger._queue` has leases that wait; others' leases are granted or wait for the load."""

    expert: ExpertId
    nbytes: int
    facts: Facts
    state: State = State.ABSENT
    slot: int = -1
    load_id: int = -1
    priority: Priority = Priority.DEMAND
    leases: dict[int, None] = field(default_factory=dict)
    failures: int = 0
    hinted: int | None = None
    """Position of the hint that stands in `Ledger._hints`; void unless it is still the soonest known use."""
    pending: bool = False
    """Counted in `prefetch_pending`."""


class Ledger:
    """Takes events, returns the instructions to carry out, in order.

    `record_bytes[l]` is the length in bytes of a record of MoE layer l, which has `experts_per_layer[l]` experts.
    `budget_bytes` may later be set anywhere from `minimum_bytes` to `max_budget_bytes` (default: `budget_bytes`), for
    which `num_slots` slots are enough. At most `prefetch_depth` prefetches are in flight; without `prefetch`, hints
    only tell the policy about next uses. Raises BudgetError for a budget below the minimum.
    """

    def __init__(
        self,
        record_bytes: Sequence[int],
        experts_per_layer: Sequence[int],
        budget_bytes: int,
        policy: Policy,
        max_budget_bytes: int | None = None,
        prefetch: bool = True,
        prefetch_depth: int = 4,
    ) -> None:
        layers = list(zip(record_bytes, experts_per_layer, strict=True))
        if not layers or min(record_bytes) < 1 or min(experts_per_layer) < 1 or prefetch_depth < 0:
            raise ValueError(f"no ledger for layers of (bytes, experts) {layers} and prefetch depth {prefetch_depth}")
        self.experts_per_layer = tuple(experts_per_layer)
        self._records = {
            (expert := ExpertId(layer, index)): _Record(expert, nbytes, Facts(expert))
            for layer, (nbytes, count) in enumerate(layers)
            for index in range(count)
        }
        sizes = [record.nbytes for record in self._records.values()]
        self.minimum_bytes = min(2 * max(sizes), sum(sizes))
        self.max_budget_bytes = budget_bytes if max_budget_bytes is None else max_budget_bytes
        self.budget_bytes = self._checked_budget(budget_bytes)
        self._cap = self.budget_bytes
        """What loads may fill: the budget, unless it was lowered while demands wait."""
        self.num_slots = slots_needed(sizes, self.max_budget_bytes)
        self.counters = Counters([0] * len(layers), [0] * len(layers), [0] * len(layers))
        self._slots = Slots(self.num_slots)
        self._policy = policy
        self._victims = Victims(policy)
        self._prefetch_depth = prefetch_depth if prefetch else 0
        self._story = Story()
        self._out: list[Instruction] = []
        self._leases: dict[int, _Record] = {}
        self._loads: dict[int, _Record] = {}
        self._queue: OrderedDict[ExpertId, _Record] = OrderedDict()
        self._prefetching: dict[ExpertId, _Record] = {}  # loads in flight that no demand holds
        self._hints: list[tuple[int, ExpertId]] = []  # heap; valid while the record's `hinted` agrees
        self._idle_bytes = self._prefetching_bytes = self._doomed_bytes = self._resident_bytes = 0
        self._position = 0
        self._lookups = 0
        self._last_load = -1
        self._handlers: dict[type, Callable[[Any], None]] = {
            Demand: self._demand, Predict: self._predict, Loaded: self._loaded, Failed: self._failed,
            Cancelled: self._cancelled, Release: self._release, Abort: self._abort, SetBudget: self._set_budget,
            Tick: self._tick,
        }  # fmt: skip

    def handle(self, event: Event) -> list[Instruction]:
        """Take in one event. Raises LedgerError for one that cannot be, BudgetError or ResourceError for a budget
        outside the allowed range; then nothing has changed.
        """
        out: list[Instruction] = []
        self._out = out
        self._handlers[type(event)](event)
        if self._cap != self.budget_bytes:
            self._follow_budget()
        if self._slots.occupied > self._cap:
            self._shrink()
        if self._queue:
            self._serve_waiting()
        if self._hints and not self._queue:
            self._start_prefetches()
        self._slots.drop_vacated(out)
        return out

    # ------------------------------------------------------------ queries

    @property
    def limit_bytes(self) -> int:
        """What charged bytes may not exceed now (law 1)."""
        return max(self._cap, self._slots.charged)

    @property
    def resident_bytes(self) -> int:
        """Bytes of resident records, leased ones included."""
        return self._resident_bytes

    @property
    def loading_bytes(self) -> int:
        """Bytes of records whose load is in flight, doomed ones included."""
        return self._slots.occupied - self._resident_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes ever charged at one instant."""
        return self._slots.peak

    def residents_by_layer(self) -> list[int]:
        """Number of resident experts (leased ones included) of each MoE layer."""
        counts = [0] * len(self.experts_per_layer)
        for record in self._records.values():
            counts[record.expert.layer] += record.state is State.RESIDENT
        return counts

    def state(self, expert: ExpertId) -> State:
        """The record's state. Raises LedgerError for an expert outside the model."""
        record = self._record(expert)
        return State.LEASED if self._is_leased(record) else record.state

    # ------------------------------------------------------------ events

    def _demand(self, event: Demand) -> None:
        record = self._record(event.expert)
        if event.lease_id in self._leases:
            raise self._story.error(f"lease {event.lease_id} is asked for twice", record.expert)
        self._leases[event.lease_id] = record
        record.leases[event.lease_id] = None
        self._story.tell(record.expert, "demanded by lease", event.lease_id)
        self._learn_use(record, event)
        self._count_lookup(record)
        if record.expert in self._queue or self._must_queue(record):
            self._queue[record.expert] = record
        else:
            self._hold(record, [event.lease_id])

    def _predict(self, event: Predict) -> None:
        records = [self._record(hint.expert) for hint in event.hints]
        for record, hint in zip(records, event.hints, strict=True):
            if hint.needed_at >= self._position:
                self._foresee(record, hint.needed_at)

    def _loaded(self, event: Loaded) -> None:
        record = self._end_load(event.load_id)
        if record.priority is Priority.DEMAND:
            self.counters.demand_loads += 1
            self.counters.demand_bytes += record.nbytes
        else:
            self.counters.prefetch_loads += 1
            self.counters.prefetch_bytes += record.nbytes
        if record.state is State.DOOMED and not self._may_revive(record):
            self._settle_prefetch(record, "wasted")
            self._vacate(record)
            return
        if record.state is State.DOOMED:
            self._settle_prefetch(record, "late")
        record.state = State.RESIDENT
        record.failures = 0
        self._resident_bytes += record.nbytes
        if record.leases and record.expert not in self._queue:
            self._grant(record, record.leases)
        else:
            self._set_idle(record)

    def _failed(self, event: Failed) -> None:
        record = self._end_load(event.load_id)
        self.counters.load_failures += 1
        self._settle_prefetch(record, "wasted")
        record.failures += bool(record.leases)
        held = record.state is State.LOADING and record.leases and record.expert not in self._queue
        if held and record.failures < ATTEMPTS:
            self._issue_load(record, Priority.DEMAND)  # in its own slot: above a lowered budget there is no other
            return
        self._vacate(record)
        if record.failures >= ATTEMPTS:
            self._deny(record, event.reason)

    def _cancelled(self, event: Cancelled) -> None:
        record = self._loads.get(event.load_id)
        if record is not None and record.state is not State.DOOMED:
            raise self._story.error(f"load {event.load_id} was cancelled though nobody asked for it", record.expert)
        record = self._end_load(event.load_id)
        self._settle_prefetch(record, "cancelled")
        self._vacate(record)

    def _release(self, event: Release) -> None:
        record = self._leases.get(event.lease_id)
        if record is None:
            raise self._story.error(f"lease {event.lease_id} is released, but is unknown or has ended")
        if not self._is_leased(record):
            raise self._story.error(f"lease {event.lease_id} is released before it was granted", record.expert)
        self._story.tell(record.expert, "released by lease", event.lease_id)
        self._end_lease(event.lease_id)

    def _abort(self, event: Abort) -> None:
        unknown = [lease_id for lease_id in event.lease_ids if lease_id not in self._leases]
        if unknown or len(set(event.lease_ids)) < len(event.lease_ids):
            raise self._story.error(f"leases {event.lease_ids} are aborted, but {unknown} have ended, or one is twice")
        for lease_id in event.lease_ids:
            self._story.tell(self._leases[lease_id].expert, "aborted by lease", lease_id)
            self._end_lease(lease_id)

    def _set_budget(self, event: SetBudget) -> None:
        self.budget_bytes = self._checked_budget(event.budget_bytes)

    def _tick(self, event: Tick) -> None:
        self._position = max(self._position, event.position)
        for record in self._records.values():
            next_use = record.facts.next_use
            if next_use is not None and next_use < self._position:
                self._forget_next_use(record)

    # ------------------------------------------------------------ what is known of uses

    def _count_lookup(self, record: _Record) -> None:
        result: LookupResult = "miss"
        if record.state is State.RESIDENT:
            result = "hit"
            self._settle_prefetch(record, "used")
        elif record.state is State.LOADING:
            result = "late"
            self._settle_prefetch(record, "late")
        counters = self.counters
        counts = counters.hits if result == "hit" else counters.late if result == "late" else counters.misses
        counts[record.expert.layer] += 1

    def _learn_use(self, record: _Record, event: Demand) -> None:
        facts = record.facts
        self._position = max(self._position, event.position)
        self._lookups += 1
        known = [use for use in (facts.next_use, event.next_use) if use is not None and use > event.position]
        facts.next_use = min(known, default=None)
        brought_in = len(record.leases) == 1 and (record.pending or record.state in (State.ABSENT, State.DOOMED))
        if event.scan and not brought_in and not facts.probation:
            return  # law 5: the working set's recency is decoding's own
        facts.probation = event.scan
        facts.last_use = self._lookups
        if not event.scan:
            self._policy.used(facts)

    def _foresee(self, record: _Record, needed_at: int) -> None:
        """A hint names the soonest known use or nothing new: later uses are told again when they are the soonest."""
        facts = record.facts
        if facts.next_use is None or needed_at < facts.next_use:
            facts.next_use = needed_at
            if facts.ticket:
                self._victims.offer(facts)
        prefetchable = self._prefetch_depth and record.state is State.ABSENT
        if prefetchable and needed_at == facts.next_use and needed_at != record.hinted:
            record.hinted = needed_at
            heappush(self._hints, (needed_at, record.expert))

    def _forget_next_use(self, record: _Record) -> None:
        """The foreseen use did not come. What was loaded for it alone is given up, or is the first to go."""
        record.facts.next_use = None
        if record.expert in self._prefetching:
            self._cancel(record)
        record.facts.probation = record.facts.probation or record.pending
        if record.facts.ticket:
            self._victims.offer(record.facts)

    # ------------------------------------------------------------ leases

    def _record(self, expert: ExpertId) -> _Record:
        record = self._records.get(expert)
        if record is None:
            raise self._story.error(f"expert {tuple(expert)} is outside the model, {self.experts_per_layer} by layer")
        return record

    def _is_leased(self, record: _Record) -> bool:
        return record.state is State.RESIDENT and bool(record.leases) and record.expert not in self._queue

    def _must_queue(self, record: _Record) -> bool:
        """Whether a new demand has to wait in line: for its own room, or lest the first in line never gets any."""
        if record.state is State.ABSENT or record.state is State.DOOMED:
            return True
        if not self._queue or len(record.leases) > 1:
            return False
        first = next(iter(self._queue.values()))
        return self._held_bytes() + record.nbytes + first.nbytes > self._cap

    def _held_bytes(self) -> int:
        """Bytes that only the end of a lease can free: leased, or loading on demand."""
        return self._slots.occupied - self._idle_bytes - self._prefetching_bytes - self._doomed_bytes

    def _hold(self, record: _Record, lease_ids: Sequence[int]) -> None:
        """Give the leases a resident record, or let them wait for one that is loading."""
        if record.state is State.RESIDENT:
            if record.facts.ticket:
                self._victims.withdraw(record.facts)
                self._idle_bytes -= record.nbytes
            self._grant(record, lease_ids)
        elif record.expert in self._prefetching:
            self._leave_prefetching(record)
            self._story.tell(record.expert, "promoted, load", record.load_id)
            self._out.append(Promote(record.load_id))

    def _grant(self, record: _Record, lease_ids: Iterable[int]) -> None:
        for lease_id in lease_ids:
            self._story.tell(record.expert, "granted to lease", lease_id)
            self._out.append(Granted(lease_id, record.expert, record.slot))

    def _deny(self, record: _Record, reason: str) -> None:
        for lease_id in record.leases:
            del self._leases[lease_id]
            self._out.append(Denied(lease_id, record.expert, reason))
        record.leases.clear()
        record.failures = 0
        self._queue.pop(record.expert, None)

    def _end_lease(self, lease_id: int) -> None:
        record = self._leases.pop(lease_id)
        del record.leases[lease_id]
        if record.leases:
            return
        record.failures = 0
        if record.expert in self._queue:
            del self._queue[record.expert]
        elif record.state is State.RESIDENT:
            self._set_idle(record)
        else:
            self._cancel(record)

    def _set_idle(self, record: _Record) -> None:
        self._idle_bytes += record.nbytes
        self._victims.offer(record.facts)

    # ------------------------------------------------------------ room

    def _serve_waiting(self) -> None:
        """Serve the line of demands from its head; stop at the first that has to wait on."""
        while self._queue:
            record = next(iter(self._queue.values()))
            if record.state is State.DOOMED or (record.state is State.ABSENT and not self._make_room(record.nbytes)):
                return
            del self._queue[record.expert]
            if record.state is State.ABSENT:
                self._load(record, Priority.DEMAND)
            else:
                self._hold(record, list(record.leases))

    def _make_room(self, nbytes: int) -> bool:
        """Evict for a demand. Where that is not enough but giving up prefetches would be, give up just enough."""
        missing = self._slots.occupied - self._idle_bytes + nbytes - self._cap
        if missing <= 0:
            while self._slots.occupied + nbytes > self._cap:
                self._evict(self._victims.take(), "capacity")
            return True
        if missing - self._doomed_bytes <= self._prefetching_bytes:
            self._cancel_prefetches(missing - self._doomed_bytes)
        return False

    def _start_prefetches(self) -> None:
        """Prefetch along the hints, soonest first; stop at the first for which there is no room."""
        while self._hints and len(self._prefetching) < self._prefetch_depth:
            needed_at, expert = self._hints[0]
            record = self._records[expert]
            if record.hinted == needed_at:
                if record.state is State.ABSENT and record.facts.next_use == needed_at >= self._position:
                    if not self._make_room_for_hint(record, needed_at):
                        return
                    self._load(record, Priority.PREFETCH)
                record.hinted = None
            heappop(self._hints)

    def _make_room_for_hint(self, record: _Record, needed_at: int) -> bool:
        """Evict for a prefetch, but only what is not known to be needed by then (law 4)."""
        short = self._slots.occupied + record.nbytes - self.budget_bytes
        if short > self._idle_bytes:
            return False
        victims: list[Facts] = []
        while short > 0:
            facts = self._victims.take_needed_after(needed_at)
            if facts is None:
                for spared in victims:
                    self._victims.offer(spared)
                return False
            victims.append(facts)
            short -= self._records[facts.expert].nbytes
        for facts in victims:
            self._evict(facts, "capacity")
        return True

    def _follow_budget(self) -> None:
        """Take a changed budget as the limit; a lowered one only as far as the first demand in line can still load.

        Leases asked for after it may hold all that the lowered budget leaves, and their consumer waits for it first.
        """
        first = next(iter(self._queue.values()), None)
        needed = self._held_bytes() + first.nbytes if first else 0
        self._cap = max(self.budget_bytes, min(self._cap, needed))

    def _shrink(self) -> None:
        """Come down to a lowered budget as far as leases and demanded loads allow."""
        while self._slots.occupied > self._cap and len(self._victims):
            self._evict(self._victims.take(), "budget_change")
        self._cancel_prefetches(self._slots.occupied - self._doomed_bytes - self._cap)

    def _evict(self, facts: Facts, reason: str) -> None:
        record = self._records[facts.expert]
        self._idle_bytes -= record.nbytes
        self._resident_bytes -= record.nbytes
        self.counters.evictions[reason] += 1
        self._story.tell(record.expert, _EVICTIONS[reason], record.slot)
        self._settle_prefetch(record, "wasted")
        self._vacate(record)

    def _vacate(self, record: _Record) -> None:
        self._slots.vacate(record.slot)
        record.slot = -1
        record.state = State.ABSENT

    def _checked_budget(self, budget_bytes: int) -> int:
        if budget_bytes < self.minimum_bytes:
            raise BudgetError(
                "expert budget", budget_bytes, self.minimum_bytes, "two slots: one computing, one loading"
            )
        if budget_bytes > self.max_budget_bytes:
            raise ResourceError(
                f"expert budget of {budget_bytes} bytes is above the {self.max_budget_bytes} bytes reserved at start"
            )
        return budget_bytes

    # ------------------------------------------------------------ loads

    def _load(self, record: _Record, priority: Priority) -> None:
        record.slot = self._slots.take(record.nbytes, self._cap, self._out)
        if priority is Priority.PREFETCH:
            record.pending = True
            record.facts.probation = False
            record.facts.last_use = self._lookups  # as if used on arrival, or history alone would evict it at once
            self.counters.prefetch_issued += 1
            self.counters.prefetch_pending += 1
            self._prefetching[record.expert] = record
            self._prefetching_bytes += record.nbytes
        self._issue_load(record, priority)

    def _issue_load(self, record: _Record, priority: Priority) -> None:
        self._last_load += 1
        record.load_id = self._last_load
        record.state = State.LOADING
        record.priority = priority
        self._loads[record.load_id] = record
        self._story.tell(record.expert, _LOADS[priority], record.load_id)
        self._out.append(Load(record.load_id, record.expert, record.slot, priority))

    def _end_load(self, load_id: int) -> _Record:
        record = self._loads.pop(load_id, None)
        if record is None:
            raise self._story.error(f"load {load_id} ended, but is not in flight")
        self._story.tell(record.expert, "end of load", load_id)
        if record.state is State.DOOMED:
            self._doomed_bytes -= record.nbytes
        elif record.expert in self._prefetching:
            self._leave_prefetching(record)
        return record

    def _cancel_prefetches(self, excess: int) -> None:
        """Give up prefetches, furthest needed first, until at least `excess` bytes will come free."""
        while excess > 0 and self._prefetching:
            record = max(self._prefetching.values(), key=_needed_at)
            self._cancel(record)
            excess -= record.nbytes

    def _cancel(self, record: _Record) -> None:
        if record.expert in self._prefetching:
            self._leave_prefetching(record)
        record.state = State.DOOMED
        self._doomed_bytes += record.nbytes
        self._story.tell(record.expert, "doomed, load", record.load_id)
        self._out.append(Cancel(record.load_id))

    def _leave_prefetching(self, record: _Record) -> None:
        del self._prefetching[record.expert]
        self._prefetching_bytes -= record.nbytes

    def _may_revive(self, record: _Record) -> bool:
        """A doomed record that was loaded after all may stay if it is what the first demand in line waits for."""
        return next(iter(self._queue.values()), None) is record and self._slots.occupied <= self._cap

    def _settle_prefetch(self, record: _Record, outcome: PrefetchOutcome) -> None:
        if record.pending:
            record.pending = False
            self.counters.end_prefetch(outcome)

    # ------------------------------------------------------------ conservation laws

    def check(self) -> None:
        """Verify everything that must hold between events. O(experts). Raises LedgerError with the story."""
        self._slots.check(self._owned_slots(), self._story)
        for record in self._records.values():
            self._check_record(record)
        sums = {
            "resident": (self._resident_bytes, self._bytes_in(State.RESIDENT, State.LEASED)),
            "loading": (self.loading_bytes, self._bytes_in(State.LOADING, State.DOOMED)),
            "doomed": (self._doomed_bytes, self._bytes_in(State.DOOMED)),
            "idle": (self._idle_bytes, sum(r.nbytes for r in self._records.values() if r.facts.ticket)),
            "prefetching": (self._prefetching_bytes, sum(r.nbytes for r in self._prefetching.values())),
            "leases": (len(self._leases), sum(len(r.leases) for r in self._records.values())),
            "loads": (len(self._loads), sum(r.state in ("loading", "doomed") for r in self._records.values())),
            "prefetches": (self.counters.prefetch_pending, sum(r.pending for r in self._records.values())),
            "prefetches issued": (self.counters.prefetch_issued, self.counters.prefetch_ended_or_pending()),
            "lookups": (self._lookups, self.counters.lookups()),
        }
        for name, (counted, real) in sums.items():
            if counted != real:
                raise self._story.error(f"law 6: {name}: counted {counted}, but there are {real}")

    def _bytes_in(self, *states: State) -> int:
        return sum(record.nbytes for expert, record in self._records.items() if self.state(expert) in states)

    def _owned_slots(self) -> dict[int, int]:
        owned: dict[int, int] = {}
        for record in self._records.values():
            if record.slot in owned:
                raise self._story.error(f"law 3: slot {record.slot} has two owners", record.expert)
            if record.slot >= 0:
                owned[record.slot] = record.nbytes
        return owned

    def _check_record(self, record: _Record) -> None:
        queued, waiting = record.expert in self._queue, bool(record.leases)
        idle = record.state is State.RESIDENT and not self._is_leased(record)
        problems = {
            "holds a slot just when absent": (record.slot >= 0) is (record.state is State.ABSENT),
            "(law 2) may be evicted though not idle, or may not though idle": bool(record.facts.ticket) is not idle,
            "waits in line without leases": queued and not waiting,
            "has leases nobody serves": waiting and not queued and record.state in (State.ABSENT, State.DOOMED),
            "is not the one its load is for": record.state in (State.LOADING, State.DOOMED)
            and self._loads.get(record.load_id) is not record,
            "is a prefetch though a demand holds it": record.expert in self._prefetching
            and (record.state is not State.LOADING or (waiting and not queued)),
        }
        for problem, holds in problems.items():
            if holds:
                raise self._story.error(f"law 3: expert {tuple(record.expert)} {problem}", record.expert)


def _needed_at(record: _Record) -> float:
    return math.inf if record.facts.next_use is None else record.facts.next_use
