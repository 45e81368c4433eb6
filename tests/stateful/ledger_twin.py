"""The naive twin of the residency ledger: dicts and sets that follow the instructions and check every law."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from expertd_engine.experts.events import (
    Abort,
    Cancel,
    Cancelled,
    Demand,
    Denied,
    Drop,
    Event,
    Exchange,
    ExpertId,
    Failed,
    Granted,
    Instruction,
    Load,
    Loaded,
    Predict,
    Priority,
    Promote,
    Release,
    SetBudget,
    Tick,
)
from expertd_engine.experts.ledger import Ledger


@dataclass
class Flight:
    expert: ExpertId
    slot: int
    priority: Priority
    doomed: bool = False


@dataclass
class Twin:
    """What a reader of design and contract believes. `sizes` maps experts to record bytes."""

    sizes: dict[ExpertId, int]
    ledger: Ledger
    thorough: bool = True  # compare everything after each event; else the instructions alone are checked
    committed: dict[int, int] = field(default_factory=dict)  # slot → bytes the system has given it
    content: dict[int, ExpertId] = field(default_factory=dict)  # slot → whole record
    flights: dict[int, Flight] = field(default_factory=dict)
    asked: dict[int, ExpertId] = field(default_factory=dict)  # lease → expert, until granted or denied
    granted: dict[int, ExpertId] = field(default_factory=dict)
    next_use: dict[ExpertId, int] = field(default_factory=dict)
    on_probation: set[ExpertId] = field(default_factory=set)
    failures: Counter[ExpertId] = field(default_factory=Counter)
    prefetched: set[ExpertId] = field(default_factory=set)  # neither demanded nor ended yet
    counts: Counter[str] = field(default_factory=Counter)
    evicted: list[ExpertId] = field(default_factory=list)  # by the last event
    unwanted: ExpertId | None = None  # a doomed record that the last event brought all the same
    position: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        self.budget = self.limit = self.ledger.budget_bytes

    def send(self, event: Event) -> list[Instruction]:
        """Hand the event to the ledger, follow its instructions one by one, compare."""
        idle_before = self.idle()
        limit_before = self.limit
        self.evicted, self.unwanted = [], None
        self._learn(event)
        out = self.ledger.handle(event)
        for instruction in out:
            self._follow(instruction)
        if self.thorough:
            self._check_event(event, out, idle_before, limit_before)
            self.compare()
        return out

    # ------------------------------------------------------------ what the twin believes

    def charged(self) -> int:
        return sum(self.committed.values())

    def one_length(self) -> bool:
        return len(set(self.sizes.values())) == 1

    def resident(self) -> set[ExpertId]:
        return set(self.content.values())

    def idle(self) -> set[ExpertId]:
        return self.resident() - set(self.granted.values())

    def flight_of(self, expert: ExpertId) -> Flight | None:
        return next((flight for flight in self.flights.values() if flight.expert == expert), None)

    def state(self, expert: ExpertId) -> str:
        flight = self.flight_of(expert)
        if flight:
            return "doomed" if flight.doomed else "loading"
        if expert in self.resident():
            return "leased" if expert in self.granted.values() else "resident"
        return "absent"

    # ------------------------------------------------------------ events

    def _learn(self, event: Event) -> None:
        match event:
            case Demand():
                self._learn_demand(event)
            case Predict(hints):
                for hint in hints:
                    if hint.needed_at >= self.position:
                        known = self.next_use.get(hint.expert, hint.needed_at)
                        self.next_use[hint.expert] = min(known, hint.needed_at)
            case Loaded(load_id):
                flight = self.flights.pop(load_id)
                self.content[flight.slot] = flight.expert
                self.unwanted = flight.expert if flight.doomed else None
                self.counts[f"{flight.priority.name} loads"] += 1
                self.counts[f"{flight.priority.name} bytes"] += self.sizes[flight.expert]
            case Failed(load_id):
                flight = self.flights.pop(load_id)
                self.counts["failures"] += 1
                self.failures[flight.expert] += flight.expert in self.asked.values()
                self._end_prefetch(flight.expert, "wasted")
            case Cancelled(load_id):
                self._end_prefetch(self.flights.pop(load_id).expert, "cancelled")
            case Release(lease_id):
                del self.granted[lease_id]
            case Exchange(released, lease_id, expert):
                del self.granted[released]
                self._learn_demand(Demand(lease_id, expert, self.position, pairs=0))
            case Abort(lease_ids):
                for lease_id in lease_ids:
                    (self.asked if lease_id in self.asked else self.granted).pop(lease_id)
            case SetBudget(budget_bytes):
                self.budget = budget_bytes
                self.limit = max(self.limit, budget_bytes)
            case Tick(position):
                self._learn_tick(position)

    def _learn_demand(self, event: Demand) -> None:
        expert, state = event.expert, self.state(event.expert)
        result = {"resident": "hit", "leased": "hit", "loading": "late"}.get(state, "miss")
        if not event.pairs:  # no use: all that changes is who holds what
            if result != "miss":
                self._end_prefetch(expert, "used" if result == "hit" else "prefetch late")
            self.asked[event.lease_id] = expert
            return
        self.counts[result] += 1
        brought_in = expert in self.prefetched or state in ("absent", "doomed")
        if not event.scan:
            self.on_probation.discard(expert)
        elif brought_in and expert not in self.asked.values():
            self.on_probation.add(expert)
        if result != "miss":
            self._end_prefetch(expert, "used" if result == "hit" else "prefetch late")
        self.asked[event.lease_id] = expert
        self.position = max(self.position, event.position)
        known = [use for use in (self.next_use.pop(expert, None), event.next_use) if use and use > event.position]
        if known:
            self.next_use[expert] = min(known)

    def _learn_tick(self, position: int) -> None:
        self.position = max(self.position, position)
        for expert in [expert for expert, use in self.next_use.items() if use < self.position]:
            del self.next_use[expert]
            if expert in self.prefetched:
                self.on_probation.add(expert)

    def _end_prefetch(self, expert: ExpertId, outcome: str) -> None:
        if expert in self.prefetched:
            self.prefetched.remove(expert)
            self.counts[outcome] += 1

    # ------------------------------------------------------------ instructions

    def _follow(self, instruction: Instruction) -> None:
        match instruction:
            case Load():
                self._follow_load(instruction)
            case Drop(slot, keep_bytes):
                assert slot not in [flight.slot for flight in self.flights.values()], "law 3: slot dropped under a load"
                assert 0 <= keep_bytes < self.committed[slot], "law 1: drop of nothing"
                self._evict(slot)
                self.committed[slot] = keep_bytes
                if not keep_bytes:
                    del self.committed[slot]
            case Cancel(load_id):
                assert not self.flights[load_id].doomed, "law 3: load cancelled twice"
                self.flights[load_id].doomed = True
            case Promote(load_id):
                flight = self.flights[load_id]
                assert flight.priority is Priority.PREFETCH and not flight.doomed, "law 4: promoted what is no prefetch"
                assert flight.expert in self.asked.values(), "law 4: promoted without a demand"
            case Granted(lease_id, expert, slot):
                assert self.content.get(slot) == expert, "law 2: lease on a slot with another record"
                self.granted[lease_id] = self.asked.pop(lease_id)
                self.failures[expert] = 0
                self._end_prefetch(expert, "prefetch late")
            case Denied(lease_id, expert):
                assert self.failures[expert] >= 2, "law 3: denied without a second try"
                del self.asked[lease_id]

    def _follow_load(self, load: Load) -> None:
        for flight in self.flights.values():
            assert flight.expert != load.expert, "law 3: two loads in flight for one expert"
            assert flight.slot != load.slot, "law 3: two loads into one slot"
        victim = self.content.get(load.slot)
        above = self.charged() > self.budget
        self._evict(load.slot)
        assert load.expert not in self.resident(), "law 3: load of a resident expert"
        self.committed[load.slot] = max(self.committed.get(load.slot, 0), self.sizes[load.expert])
        assert self.charged() <= self.limit, f"law 1: {self.charged()} bytes charged of {self.limit}"
        self.peak = max(self.peak, self.charged())
        assert not above or load.priority is Priority.DEMAND, "law 1: prefetch above the budget"
        self.flights[load.load_id] = Flight(load.expert, load.slot, load.priority)
        if load.priority is Priority.DEMAND:
            assert load.expert in self.asked.values(), "law 4: demand load without a demand"
        else:
            self._check_prefetch(load, victim)

    def _check_prefetch(self, load: Load, victim: ExpertId | None) -> None:
        ours = [lease for lease, expert in self.asked.items() if self.state(expert) in ("absent", "doomed")]
        assert not ours, "law 4: prefetch while a demand waits"
        needed_at = self.next_use[load.expert]
        assert needed_at >= self.position, "law 4: prefetch for a stale hint"
        if victim in self.next_use and victim != self.unwanted and self.one_length():
            assert self.next_use[victim] > needed_at, "law 4: prefetch evicts what is needed sooner"
        self.prefetched.add(load.expert)
        self.on_probation.discard(load.expert)
        self.counts["issued"] += 1

    def _evict(self, slot: int) -> None:
        expert = self.content.get(slot)
        if expert is not None:
            assert expert not in self.granted.values(), "law 2: a leased expert is evicted"
            self._end_prefetch(expert, "wasted")
            self.evicted.append(expert)
            del self.content[slot]

    # ------------------------------------------------------------ comparisons

    def _check_event(self, event: Event, out: list[Instruction], idle_before: set[ExpertId], limit_before: int) -> None:
        loads = [i for i in out if isinstance(i, Load)]
        prefetches = [load.expert for load in loads if load.priority is Priority.PREFETCH]
        if prefetches and len(prefetches) == len(loads) and not isinstance(event, SetBudget):
            # Of two lengths, one prefetch may evict several, and the next one may take what it left over.
            soonest = min(self.next_use[expert] for expert in prefetches)
            sooner = [e for e in self.evicted if e != self.unwanted and self.next_use.get(e, math.inf) <= soonest]
            assert not sooner or limit_before > self.budget, f"law 4: prefetch evicts {sooner}, needed sooner"
        if not prefetches:
            spared = idle_before & self.idle() & self.on_probation
            gone = [e for e in self.evicted if e in idle_before and e not in self.on_probation]
            assert not (gone and spared), f"law 5: {gone} evicted before {spared}"
        if isinstance(event, Demand) and event.expert in idle_before and self.one_length():
            assert Granted in map(type, out), "a resident expert is granted at once"

    def compare(self) -> None:
        """The ledger's queries and counters against the twin's own."""
        ledger, counters = self.ledger, self.ledger.counters
        assert {e: str(ledger.state(e)) for e in self.sizes} == {e: self.state(e) for e in self.sizes}
        resident = sum(self.sizes[e] for e in self.resident())
        loading = sum(self.sizes[flight.expert] for flight in self.flights.values())
        assert self.charged() == resident + loading, "law 1: a free slot keeps memory"
        counted_bytes = (ledger.resident_bytes, ledger.loading_bytes, ledger.peak_bytes)
        assert counted_bytes == (resident, loading, self.peak), "law 1: bytes resident, loading and at the peak"
        assert self.charged() <= ledger.limit_bytes <= max(self.limit, self.budget), "law 1: the limit rises"
        if not any(self.state(expert) in ("absent", "doomed") for expert in self.asked.values()):
            assert not self.one_length() or ledger.limit_bytes == max(self.budget, self.charged()), (
                "law 1: the limit stays high"
            )
        self.limit = ledger.limit_bytes
        assert ledger.budget_bytes == self.budget
        assert sum(ledger.residents_by_layer()) == len(self.content)
        counted = {
            "hit": sum(counters.hits), "late": sum(counters.late), "miss": sum(counters.misses),
            "DEMAND loads": counters.demand_loads, "DEMAND bytes": counters.demand_bytes,
            "PREFETCH loads": counters.prefetch_loads, "PREFETCH bytes": counters.prefetch_bytes,
            "issued": counters.prefetch_issued, "used": counters.prefetch_used, "wasted": counters.prefetch_wasted,
            "prefetch late": counters.prefetch_late,
            "cancelled": counters.prefetch_cancelled, "failures": counters.load_failures,
        }  # fmt: skip
        wrong = {name: (count, self.counts[name]) for name, count in counted.items() if count != self.counts[name]}
        assert not wrong, f"law 6: counters (ledger, twin): {wrong}"
        assert counters.prefetch_pending == len(self.prefetched), "law 6: pending prefetches"
        ledger.check()
