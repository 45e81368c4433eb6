"""Random histories of the residency ledger against its naive twin, which checks every law after every instruction."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from expertd_engine.errors import BudgetError, ResourceError
from expertd_engine.experts.events import (
    Abort,
    Cancelled,
    Demand,
    Event,
    Exchange,
    ExpertId,
    Failed,
    Granted,
    Hint,
    Load,
    Loaded,
    Predict,
    Release,
    SetBudget,
    Tick,
)
from expertd_engine.experts.ledger import Ledger, LedgerError
from expertd_engine.experts.policy import make_policy
from stateful.ledger_twin import Twin

EXPERTS_PER_LAYER = (4, 4)
EXPERTS = [ExpertId(layer, index) for layer in range(2) for index in range(4)]
LIMITS = settings(max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class LedgerMachine(RuleBasedStateMachine):
    """Records of two lengths, or of one; a consumer that asks, releases and aborts in any order; loads in any order."""

    @initialize(
        record_bytes=st.sampled_from([(1, 2), (3, 2), (2, 2)]),
        policy=st.sampled_from(["lru", "lfu", "next-use"]),
        prefetch_depth=st.sampled_from([3, 1]),
        prefetch=st.sampled_from([True, True, False]),
        spare=st.integers(0, 8),
        data=st.data(),
    )
    def start(
        self,
        record_bytes: tuple[int, int],
        policy: str,
        prefetch_depth: int,
        prefetch: bool,
        spare: int,
        data: st.DataObject,
    ) -> None:
        minimum = 2 * max(record_bytes)
        self.maximum = minimum + spare
        budget = data.draw(st.integers(minimum, self.maximum))
        ledger = Ledger(
            record_bytes, EXPERTS_PER_LAYER, budget, make_policy(policy), self.maximum, prefetch, prefetch_depth
        )
        self.twin = Twin({expert: record_bytes[expert.layer] for expert in EXPERTS}, ledger)
        self.next_lease = 0
        self.ended: list[int] = []
        self.now = 0

    # ------------------------------------------------------------ what the step does

    @rule(expert=st.sampled_from(EXPERTS), scan=st.booleans(), next_use=st.none() | st.integers(1, 40))
    def demand(self, expert: ExpertId, scan: bool, next_use: int | None) -> None:
        self.now += 1
        after = None if next_use is None else self.now + next_use
        self.twin.send(Demand(self.next_lease, expert, self.now, after, scan))
        self.next_lease += 1

    @rule(expert=st.sampled_from(EXPERTS))
    def hold(self, expert: ExpertId) -> None:
        """As virtual mode does, between steps: a lease that is no use."""
        self.twin.send(Demand(self.next_lease, expert, self.now, pairs=0))
        self.next_lease += 1

    @rule(foreseen=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(EXPERTS)), max_size=6))
    def predict(self, foreseen: list[tuple[int, ExpertId]]) -> None:
        self.twin.send(Predict(tuple(Hint(expert, self.now + ahead) for ahead, expert in sorted(foreseen))))

    @precondition(lambda self: self.twin.granted)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.twin.granted)))
        self.twin.send(Release(lease))
        self.ended.append(lease)

    @precondition(lambda self: self.twin.granted)
    @rule(data=st.data(), expert=st.sampled_from(EXPERTS))
    def exchange(self, data: st.DataObject, expert: ExpertId) -> None:
        """As virtual mode swaps: who is alone in leaving gives its very slot up where there is no other room."""
        twin = self.twin
        lease = data.draw(st.sampled_from(sorted(twin.granted)))
        leaves, full = twin.granted[lease], twin.charged() + twin.sizes[expert] > twin.budget
        alone = [*twin.granted.values(), *twin.asked.values()].count(leaves) == 1
        fits = twin.sizes[leaves] == twin.sizes[expert] and twin.state(expert) == "absent"
        waits = any(twin.state(other) in ("absent", "doomed") for other in twin.asked.values())
        free = twin.limit == twin.budget and expert not in twin.asked.values() and not waits
        slot = next(slot for slot, content in twin.content.items() if content == leaves)
        out = twin.send(Exchange(lease, self.next_lease, expert))
        if full and alone and fits and free and twin.one_length():
            assert [(i.expert, i.slot) for i in out if isinstance(i, Load)][:1] == [(expert, slot)]
        self.ended.append(lease)
        self.next_lease += 1

    @precondition(lambda self: self.twin.granted or self.twin.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        alive = sorted({**self.twin.granted, **self.twin.asked})
        leases = data.draw(st.lists(st.sampled_from(alive), unique=True, max_size=3))
        self.twin.send(Abort(tuple(leases)))
        self.ended += leases

    @rule(steps=st.integers(1, 10))
    def tick(self, steps: int) -> None:
        self.now += steps
        self.twin.send(Tick(self.now))

    # ------------------------------------------------------------ what the box does

    @precondition(lambda self: self.twin.flights)
    @rule(data=st.data(), outcome=st.sampled_from(["loaded", "loaded", "failed", "cancelled"]))
    def end_load(self, data: st.DataObject, outcome: str) -> None:
        load_id = data.draw(st.sampled_from(sorted(self.twin.flights)))
        self.twin.send(self._ended_as(load_id, outcome))

    @rule(data=st.data())
    def set_budget(self, data: st.DataObject) -> None:
        self.twin.send(SetBudget(data.draw(st.integers(self.twin.ledger.minimum_bytes, self.maximum))))

    def _ended_as(self, load_id: int, outcome: str) -> Event:
        if outcome == "failed":
            return Failed(load_id, "read error")
        if outcome == "cancelled" and self.twin.flights[load_id].doomed:
            return Cancelled(load_id)
        return Loaded(load_id)

    # ------------------------------------------------------------ what must be refused, and change nothing

    @rule(data=st.data())
    def refuse_what_cannot_be(self, data: st.DataObject) -> None:
        never = self.next_lease + 1
        impossible: list[Event] = [
            Loaded(10**6),
            Failed(10**6, ""),
            Cancelled(10**6),
            Release(never),
            Abort((never,)),
            Demand(never, ExpertId(0, 4), self.now),
            Predict((Hint(ExpertId(2, 0), self.now + 1),)),
            *(Cancelled(load_id) for load_id, flight in self.twin.flights.items() if not flight.doomed),
            *(Release(lease) for lease in self.twin.asked),
            *(Exchange(lease, never, EXPERTS[0]) for lease in [*self.twin.asked, *self.ended, never]),
            *(Exchange(lease, lease, EXPERTS[0]) for lease in self.twin.granted),
            *(Release(lease) for lease in self.ended),
            *(Demand(lease, EXPERTS[0], self.now) for lease in self.twin.granted),
        ]
        event = data.draw(st.sampled_from(impossible))
        self._refused(event, LedgerError)

    @rule(below=st.booleans())
    def refuse_budget(self, below: bool) -> None:
        minimum = self.twin.ledger.minimum_bytes
        self._refused(SetBudget(minimum - 1 if below else self.maximum + 1), BudgetError if below else ResourceError)

    def _refused(self, event: Event, error: type[Exception]) -> None:
        try:
            self.twin.ledger.handle(event)
        except error:
            self.twin.compare()
        else:
            raise AssertionError(f"law 3: {event} must be refused")

    # ------------------------------------------------------------ the end

    def teardown(self) -> None:
        """Once loads end well and leases are released, every demand is served and nothing is left behind."""
        if not hasattr(self, "twin"):
            return
        while self.twin.asked or self.twin.granted or self.twin.flights:
            if self.twin.flights:
                self.twin.send(Loaded(min(self.twin.flights)))
            else:
                assert self.twin.granted, f"deadlock: {self.twin.asked} wait for ever"
                self.twin.send(Release(min(self.twin.granted)))
        assert self.twin.charged() <= self.twin.budget, "law 1: above the budget without leases"
        out = self.twin.send(Demand(self.next_lease, EXPERTS[0], self.now))
        for load_id in list(self.twin.flights):
            out += self.twin.send(Loaded(load_id))
        assert any(isinstance(i, Granted) and i.lease_id == self.next_lease for i in out), "an idle ledger must serve"


TestLedger = LedgerMachine.TestCase
TestLedger.settings = LIMITS
