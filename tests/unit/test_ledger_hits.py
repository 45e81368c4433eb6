"""What the ledger is for: hits, and what counts as one, whatever scans, holds or uses in passing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import pytest

from expertd_engine.experts.events import Demand, ExpertId, Granted, Load, Loaded, Release, Served, Tick, Used
from expertd_engine.experts.ledger import Ledger, LedgerError
from expertd_engine.experts.lookahead import EveryExpert
from expertd_engine.experts.policy import make_policy
from support.ledgers import A, B, C, Consumer, D, KnownTrace, load_of, make, resident

# ---------------------------------------------------------------- scans (law 5)


@pytest.mark.parametrize("policy", ["lru", "lfu", "next-use"])
def test_a_scan_does_not_flush_the_working_set(policy: str) -> None:
    ledger = make(slots=4, experts=40, policy=policy)
    consumer = Consumer(ledger)
    consumer.use([A, B, C])
    consumer.use([ExpertId(0, index) for index in range(4, 40)], start=3, scan=True)
    assert resident(ledger, [A, B, C]) == [A, B, C]


def test_a_scan_does_not_refresh_but_decoding_takes_into_the_working_set() -> None:
    ledger = make(slots=3, experts=5)
    consumer = Consumer(ledger)
    consumer.use([A, B])
    consumer.use([A, C], start=2, scan=True)
    consumer.use([C], start=4)
    consumer.use([D], start=5)
    assert resident(ledger, [A, B, C, D]) == [B, C, D]


# ---------------------------------------------------------------- what it is for: hits


@pytest.mark.parametrize("policy, at_least, at_most", [("next-use", 0.23, 0.25), ("lru", 0.0, 0.0)])
def test_a_cycle_over_all_experts_at_a_quarter_of_the_slots(policy: str, at_least: float, at_most: float) -> None:
    layers, experts = 30, 16
    ledger = Ledger([4096] * layers, [experts] * layers, 120 * 4096, make_policy(policy), prefetch=False)
    consumer = Consumer(ledger, window=4, lookahead=EveryExpert(layers, experts, window=0))
    cycle = [ExpertId(*divmod(index, experts)) for index in range(layers * experts)]
    consumer.use(cycle)
    cold_hits, cold = sum(ledger.counters.hits), ledger.counters.lookups()
    for step in range(1, 6):
        consumer.use(cycle, start=step * len(cycle))
        ledger.handle(Tick((step + 1) * len(cycle)))
    rate = (sum(ledger.counters.hits) - cold_hits) / (ledger.counters.lookups() - cold)
    assert at_least <= rate <= at_most
    assert ledger.peak_bytes == ledger.budget_bytes
    ledger.check()


@pytest.mark.parametrize("seed", range(20))
def test_next_use_with_exact_lookahead_is_optimal(seed: int) -> None:
    rng = random.Random(seed)
    trace = tuple(ExpertId(0, rng.randrange(5)) for _ in range(14))
    for slots in (2, 3):
        ledger = make(slots, experts=5, policy="next-use", prefetch=False)
        Consumer(ledger, lookahead=KnownTrace(trace)).use(trace)
        assert sum(ledger.counters.hits) == most_hits(trace, slots)


def most_hits(trace: tuple[ExpertId, ...], slots: int) -> int:
    """By trying every victim at every miss."""

    @cache
    def best(position: int, held: frozenset[ExpertId]) -> int:
        if position == len(trace):
            return 0
        expert = trace[position]
        if expert in held:
            return 1 + best(position + 1, held)
        return max(best(position + 1, kept | {expert}) for kept in _room(held, slots))

    return best(0, frozenset())


def _room(held: frozenset[ExpertId], slots: int) -> Iterator[frozenset[ExpertId]]:
    if len(held) < slots:
        yield held
    else:
        yield from (held - {victim} for victim in held)


# ---------------------------------------------------------------- uses without a lease of their own


def test_a_lease_that_serves_no_token_is_no_lookup() -> None:
    ledger = make(slots=3)
    load = load_of(ledger.handle(Demand(1, A, 0, pairs=0)))
    assert Granted(1, A, load.slot) in ledger.handle(Loaded(load.load_id))
    for position in range(1, 9):  # others come and go, what is held stays
        lease = 1 + position
        out = ledger.handle(Demand(lease, (B, C, D)[position % 3], position))
        loads = [one for one in out if isinstance(one, Load)]
        out += [after for one in loads for after in ledger.handle(Loaded(one.load_id))]
        assert any(isinstance(one, Granted) for one in out)
        ledger.handle(Release(lease))
        assert ledger.state(A) == "leased"
    assert ledger.counters.lookups() == 8
    ledger.handle(Release(1))
    ledger.check()


@pytest.mark.parametrize("policy", ["lru", "lfu", "next-use"])
def test_uses_in_passing_are_demands_and_releases(policy: str) -> None:
    """The same counters, and the same experts give way afterwards."""
    asked, passed = make(slots=3, policy=policy), make(slots=3, policy=policy)
    for ledger in (asked, passed):
        Consumer(ledger).use([A, B, C])
    Consumer(asked).use([B, C, B], start=10)
    assert not passed.handle_all([Used(0, (1,), (1,), 9), Used(0, (2,), (1,), 9), Used(0, (1,), (1,), 11)])
    for ledger in (asked, passed):
        ledger.check()
        assert ledger.counters.hits == [3] and ledger.resident_slots(0)[0] >= 0
        Consumer(ledger).use([D], start=20)
        assert [ledger.state(expert) for expert in (A, B, C, D)] == ["absent", "resident", "resident", "resident"]
        assert ledger.resident_slots(0)[0] == -1
    assert asked.counters == passed.counters


def test_what_held_experts_serve_are_hits_and_age_nobody() -> None:
    served, still = make(slots=3), make(slots=3)
    for ledger in (served, still):
        Consumer(ledger).use([A, B, C])
    assert not served.handle(Served(((0, 2, 5),)))
    served.check()
    assert (served.counters.hits, served.counters.activations["hit"]) == ([2], [5])
    for ledger in (served, still):
        Consumer(ledger).use([D], start=20)
    assert [served.state(e) for e in (A, B, C, D)] == [still.state(e) for e in (A, B, C, D)]


def test_what_is_not_resident_cannot_be_used_in_passing() -> None:
    ledger = make()
    Consumer(ledger).use([A])
    with pytest.raises(LedgerError, match="law 2: was used in passing"):
        ledger.handle(Used(0, (0, 1), (1, 1), 5))
