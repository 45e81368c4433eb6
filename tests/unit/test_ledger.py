"""What the ledger does event by event: leases, bytes and budgets, prefetches."""

from __future__ import annotations

import pytest

from expertd_engine.errors import BudgetError, ResourceError
from expertd_engine.experts.events import (
    Abort,
    Cancel,
    Cancelled,
    Demand,
    Denied,
    Drop,
    Exchange,
    ExpertId,
    Failed,
    Granted,
    Hint,
    Load,
    Loaded,
    Predict,
    Priority,
    Promote,
    Release,
    SetBudget,
    Tick,
)
from expertd_engine.experts.ledger import Ledger, LedgerError
from expertd_engine.experts.policy import make_policy
from support.ledgers import A, B, C, Consumer, D, load_of, make, resident

# ---------------------------------------------------------------- one lease, start to end


def test_a_miss_is_loaded_granted_and_then_a_hit() -> None:
    ledger = make()
    (load,) = ledger.handle(Demand(7, A, 0))
    assert load == Load(0, A, 0, Priority.DEMAND)
    assert ledger.state(A) == "loading"
    assert ledger.handle(Loaded(0)) == [Granted(7, A, 0)]
    assert ledger.state(A) == "leased"
    assert ledger.handle(Demand(8, A, 1)) == [Granted(8, A, 0)]
    assert ledger.handle(Release(7)) == []
    assert ledger.state(A) == "leased"
    ledger.handle(Release(8))
    assert ledger.state(A) == "resident"
    assert (ledger.counters.hits, ledger.counters.late, ledger.counters.misses) == ([1], [0], [1])


def test_a_second_demand_during_the_load_is_late_and_granted_with_the_first() -> None:
    ledger = make()
    ledger.handle(Demand(0, A, 0))
    assert ledger.handle(Demand(1, A, 0)) == []
    assert ledger.handle(Loaded(0)) == [Granted(0, A, 0), Granted(1, A, 0)]
    assert ledger.counters.late == [1]


def test_a_demand_without_room_waits_for_a_release_and_takes_the_slot() -> None:
    ledger = make()
    for lease, expert in enumerate((A, B)):
        ledger.handle(Demand(lease, expert, lease))
        ledger.handle(Loaded(lease))
    assert ledger.handle(Demand(2, C, 2)) == []
    assert ledger.handle(Release(1)) == [Load(2, C, 1, Priority.DEMAND)]
    assert ledger.state(B) == "absent"


def holding(slots: int) -> Ledger:
    """A and B are leased."""
    ledger = make(slots)
    for lease, expert in enumerate((A, B)):
        ledger.handle(Demand(lease, expert, 0, pairs=0))
        ledger.handle(Loaded(lease))
    return ledger


def test_an_exchange_gives_the_very_slot_where_there_is_no_other_room() -> None:
    ledger = holding(slots=2)
    assert ledger.handle(Exchange(0, 2, C)) == [Load(2, C, 0, Priority.DEMAND)]
    assert (ledger.state(A), ledger.state(C)) == ("absent", "loading")
    assert ledger.counters.evictions == {"capacity": 1, "budget_change": 0}
    assert ledger.handle(Loaded(2)) == [Granted(2, C, 0)]
    ledger.check()


def test_an_exchange_takes_nobody_away_who_is_used_elsewhere_or_for_whom_there_is_room() -> None:
    roomy = holding(slots=3)
    assert load_of(roomy.handle(Exchange(0, 2, C))).slot == 2
    assert roomy.state(A) == "resident"
    shared = holding(slots=2)
    shared.handle(Demand(5, A, 0, pairs=0))
    assert shared.handle(Exchange(0, 2, C)) == [], "C waits for room"
    assert load_of(shared.handle(Release(1))) == Load(2, C, 1, Priority.DEMAND)
    at_hand = holding(slots=2)
    at_hand.handle(Release(1))
    assert at_hand.handle(Exchange(0, 2, B)) == [Granted(2, B, 1)]
    for ledger in (roomy, shared, at_hand):
        ledger.check()


def test_waiting_demands_are_served_in_the_order_asked() -> None:
    ledger = make()
    for lease, expert in enumerate((A, B, C, D)):
        ledger.handle(Demand(lease, expert, lease))
    ledger.handle(Loaded(0))
    ledger.handle(Loaded(1))
    assert load_of(ledger.handle(Release(0))).expert == C
    assert load_of(ledger.handle(Release(1))).expert == D


def test_a_failed_demand_is_tried_once_more_then_denied() -> None:
    ledger = make()
    ledger.handle(Demand(0, A, 0))
    assert ledger.handle(Failed(0, "read error")) == [Load(1, A, 0, Priority.DEMAND)]
    assert ledger.handle(Failed(1, "read error")) == [Denied(0, A, "read error"), Drop(0)]
    assert ledger.state(A) == "absent" and ledger.counters.load_failures == 2
    with pytest.raises(LedgerError):
        ledger.handle(Release(0))


def test_an_aborted_load_is_doomed_charged_until_it_ends_and_dropped() -> None:
    ledger = make()
    ledger.handle(Demand(0, A, 0))
    assert ledger.handle(Abort((0,))) == [Cancel(0)]
    assert (ledger.state(A), ledger.loading_bytes) == ("doomed", 1)
    assert ledger.handle(Loaded(0)) == [Drop(0)]
    assert ledger.loading_bytes == ledger.resident_bytes == 0


def test_a_demand_for_a_doomed_record_takes_it_if_it_comes_and_loads_it_if_not() -> None:
    for answer, expected in ((Loaded(0), Granted(1, A, 0)), (Cancelled(0), Load(1, A, 0, Priority.DEMAND))):
        ledger = make()
        ledger.handle(Demand(0, A, 0))
        ledger.handle(Abort((0,)))
        assert ledger.handle(Demand(1, A, 1)) == []
        assert ledger.handle(answer) == [expected]


# ---------------------------------------------------------------- bytes and budgets (law 1)


def test_slots_suffice_for_the_largest_budget() -> None:
    assert Ledger([10], [100], 30, make_policy("lru"), 55).num_slots == 5
    assert Ledger([10], [3], 1000, make_policy("lru")).num_slots == 3
    assert Ledger([10, 3], [5, 4], 30, make_policy("lru")).num_slots == 5


def test_a_shorter_record_in_a_longer_ones_slot_gives_the_rest_back() -> None:
    ledger = Ledger([4, 3], [2, 2], 8, make_policy("lru"))
    consumer = Consumer(ledger)
    consumer.use([A, B])
    instructions = ledger.handle(Demand(9, ExpertId(1, 0), 2))
    assert instructions == [Drop(0, 3), Load(2, ExpertId(1, 0), 0, Priority.DEMAND)]
    assert ledger.resident_bytes + ledger.loading_bytes == 7


def test_a_longer_record_takes_the_bytes_of_two() -> None:
    ledger = Ledger([4, 2], [2, 4], 8, make_policy("lru"))
    consumer = Consumer(ledger)
    consumer.use([ExpertId(1, index) for index in range(4)])
    instructions = ledger.handle(Demand(9, A, 9))
    assert [type(i) for i in instructions] == [Drop, Load]
    assert ledger.resident_bytes + ledger.loading_bytes == ledger.peak_bytes == 8


def test_shrinking_evicts_what_is_idle_at_once_and_the_rest_as_leases_end() -> None:
    ledger = make(slots=4)
    for lease, expert in enumerate((A, B, C, D)):
        ledger.handle(Demand(lease, expert, lease))
        ledger.handle(Loaded(lease))
    ledger.handle(Release(0))
    assert ledger.handle(SetBudget(2)) == [Drop(0)]
    assert (ledger.budget_bytes, ledger.limit_bytes) == (2, 3)
    assert ledger.handle(Demand(4, A, 4)) == []
    assert ledger.handle(Release(3)) == [Drop(3)]
    assert ledger.limit_bytes == 2
    assert load_of(ledger.handle(Release(2))).expert == A
    assert ledger.counters.evictions == {"capacity": 1, "budget_change": 2}


def test_growing_serves_who_waits() -> None:
    ledger = make(most=3)
    for lease, expert in enumerate((A, B, C)):
        ledger.handle(Demand(lease, expert, lease))
    assert load_of(ledger.handle(SetBudget(3))).expert == C


def test_budgets_outside_the_range_are_refused_and_change_nothing() -> None:
    ledger = Ledger([10], [8], 40, make_policy("lru"))
    with pytest.raises(BudgetError, match="19 bytes is 1 bytes too small: the smallest that works is 20"):
        ledger.handle(SetBudget(19))
    with pytest.raises(ResourceError, match="41 bytes is above the 40 bytes"):
        ledger.handle(SetBudget(41))
    assert ledger.budget_bytes == 40
    with pytest.raises(BudgetError):
        Ledger([10], [8], 19, make_policy("lru"))


def test_a_shrink_while_loads_fail_leaves_nobody_waiting_for_ever() -> None:
    ledger = make(slots=3)
    for lease, expert in enumerate((A, B, C)):
        ledger.handle(Demand(lease, expert, lease))
    ledger.handle(SetBudget(2))
    assert ledger.handle(Failed(0, "read error")) == [Load(3, A, 0, Priority.DEMAND)]


# ---------------------------------------------------------------- prefetch (law 4)


def test_hints_start_prefetches_soonest_first_up_to_the_depth() -> None:
    ledger = Ledger([1], [4], 4, make_policy("lru"), prefetch_depth=2)
    out = ledger.handle(Predict((Hint(A, 1), Hint(B, 2), Hint(C, 3))))
    assert [(i.expert, i.priority) for i in out if isinstance(i, Load)] == [
        (A, Priority.PREFETCH),
        (B, Priority.PREFETCH),
    ]
    assert load_of(ledger.handle(Loaded(0))).expert == C
    assert (ledger.counters.prefetch_issued, ledger.counters.prefetch_pending) == (3, 3)


def test_a_demand_promotes_the_prefetch_it_meets() -> None:
    ledger = make()
    ledger.handle(Predict((Hint(A, 1),)))
    assert ledger.handle(Demand(0, A, 1)) == [Promote(0)]
    assert ledger.handle(Loaded(0)) == [Granted(0, A, 0)]
    assert (ledger.counters.late, ledger.counters.prefetch_late) == ([1], 1)


def test_a_demand_takes_the_room_of_the_prefetch_needed_last() -> None:
    ledger = make()
    ledger.handle(Predict((Hint(A, 1), Hint(B, 2))))
    assert ledger.handle(Demand(0, C, 0)) == [Cancel(1)]
    assert ledger.handle(Cancelled(1)) == [Load(2, C, 1, Priority.DEMAND)]
    assert (ledger.counters.prefetch_cancelled, ledger.counters.prefetch_pending) == (1, 1)


def test_a_prefetch_evicts_only_what_is_not_needed_sooner() -> None:
    ledger = make()
    ledger.handle(Predict((Hint(A, 5), Hint(B, 9))))
    ledger.handle(Loaded(0))
    ledger.handle(Loaded(1))
    assert ledger.handle(Predict((Hint(C, 9),))) == []
    assert ledger.handle(Predict((Hint(C, 7),))) == [Load(2, C, 1, Priority.PREFETCH)]
    assert ledger.counters.prefetch_wasted == 1


def test_no_prefetch_is_issued_while_a_demand_waits() -> None:
    ledger = make(slots=2)
    for lease, expert in enumerate((A, B, C)):
        ledger.handle(Demand(lease, expert, lease))
        if lease < 2:
            ledger.handle(Loaded(lease))
    assert ledger.handle(Predict((Hint(D, 5),))) == []
    assert load_of(ledger.handle(Release(0))).expert == C
    assert load_of(ledger.handle(Release(1))).expert == D


def test_a_prefetch_whose_time_has_passed_is_given_up() -> None:
    ledger = make()
    ledger.handle(Predict((Hint(A, 3),)))
    assert ledger.handle(Tick(3)) == []
    assert ledger.handle(Tick(4)) == [Cancel(0)]
    assert ledger.handle(Loaded(0)) == [Drop(0)]
    assert ledger.counters.prefetch_wasted == 1


def test_a_failed_prefetch_is_dropped_and_not_tried_again() -> None:
    ledger = make()
    ledger.handle(Predict((Hint(A, 3),)))
    assert ledger.handle(Failed(0, "read error")) == [Drop(0)]
    assert ledger.counters.prefetch_wasted == ledger.counters.load_failures == 1


def test_without_prefetch_hints_only_teach_the_policy() -> None:
    ledger = make(policy="next-use", prefetch=False)
    Consumer(ledger).use([A, B])
    assert ledger.handle(Predict((Hint(A, 5), Hint(C, 6), Hint(B, 9)))) == []
    ledger.handle(Demand(9, D, 2))
    assert resident(ledger, [A, B]) == [A]


# ---------------------------------------------------------------- our bugs


def test_impossible_events_raise_and_tell_the_story() -> None:
    ledger = make()
    ledger.handle(Demand(0, A, 0))
    with pytest.raises(LedgerError, match=r"before it was granted; recently:\n  0/0: demanded by lease 0"):
        ledger.handle(Release(0))
    ledger.handle(Loaded(0))
    ledger.handle(Release(0))
    for event in (Release(0), Loaded(0), Cancelled(5), Abort((0,)), Demand(1, ExpertId(0, 4), 1)):
        with pytest.raises(LedgerError):
            ledger.handle(event)
    assert ledger.state(A) == "resident"
    ledger.check()


def test_layers_without_experts_or_bytes_are_refused() -> None:
    for record_bytes, experts in (([], []), ([0], [4]), ([8], [0])):
        with pytest.raises(ValueError, match="no ledger for layers"):
            Ledger(record_bytes, experts, 100, make_policy("lru"))
