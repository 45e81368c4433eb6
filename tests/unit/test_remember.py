"""What a ledger hands to the one after it, and how that one takes it up."""

from __future__ import annotations

import pytest

from expertd_engine.experts.events import (
    Demand,
    ExpertId,
    Granted,
    Instruction,
    Load,
    Loaded,
    PastUse,
    Priority,
    Promote,
    Release,
    Remember,
)
from expertd_engine.experts.ledger import Ledger, LedgerError
from expertd_engine.experts.policy import make_policy

A, B, C, D = (ExpertId(0, index) for index in range(4))


def make(slots: int = 3, policy: str = "lru", depth: int = 4) -> Ledger:
    return Ledger([1], [4], slots, make_policy(policy, 1), prefetch_depth=depth)


def loads(instructions: list[Instruction]) -> list[Load]:
    return [one for one in instructions if isinstance(one, Load)]


def use(ledger: Ledger, *experts: ExpertId, first: int = 0) -> None:
    for lease, expert in enumerate(experts, first):
        for load in loads(ledger.handle(Demand(lease, expert, lease))):
            ledger.handle(Loaded(load.load_id))
        ledger.handle(Release(lease))


@pytest.mark.parametrize("policy", ["lru", "lfu", "next-use"])
def test_the_next_ledger_holds_the_same_and_gives_it_up_in_the_same_order(policy: str) -> None:
    old, new = make(policy=policy), make(policy=policy)
    use(old, A, B, A, C, A, D)
    told = loads(new.handle(old.recollection()))
    assert [load.priority for load in told] == [Priority.PREFETCH] * 3
    for load in told:
        new.handle(Loaded(load.load_id))
    new.check()
    everyone = (A, B, C, D)
    assert [new.state(e) for e in everyone] == [old.state(e) for e in everyone] and not new.is_refilling
    absent = next(e for e in everyone if old.state(e) == "absent")
    use(old, absent, first=50)
    use(new, absent, first=50)
    assert [new.state(e) for e in everyone] == [old.state(e) for e in everyone], "the same one gave way"
    assert new.counters.prefetch_issued == 0, "what is loaded again was not foreseen"


def test_the_best_come_first_as_far_as_there_is_room() -> None:
    old, new = make(slots=3), make(slots=2)
    use(old, A, B, C)
    told = loads(new.handle(old.recollection()))
    assert [load.expert for load in told] == [C, B]
    for load in told:
        assert not loads(new.handle(Loaded(load.load_id)))
    assert not new.is_refilling


def test_a_few_are_read_at_once() -> None:
    old, new = make(slots=3), make(slots=3, depth=1)
    use(old, A, B, C)
    instructions, seen = new.handle(old.recollection()), []
    while told := loads(instructions):
        assert len(told) == 1
        seen.append(told[0].expert)
        instructions = new.handle(Loaded(told[0].load_id))
    assert seen == [C, B, A]


def test_a_demand_overtakes_and_takes_what_is_on_its_way() -> None:
    old, new = make(slots=2), make(slots=2)
    use(old, A, B)
    told = {load.expert: load.load_id for load in loads(new.handle(old.recollection()))}
    assert new.handle(Demand(1, A, 1)) == [Promote(told[A])]
    assert [one.lease_id for one in new.handle(Loaded(told[A])) if isinstance(one, Granted)] == [1]
    wanted = new.handle(Demand(2, C, 2))  # there is room only once the other one has been given up
    assert not loads(wanted)
    assert [load.expert for load in loads(new.handle(Loaded(told[B])))] == [C]
    new.check()


def test_only_a_fresh_ledger_remembers() -> None:
    ledger = make()
    use(ledger, A)
    with pytest.raises(LedgerError, match="first lookup"):
        ledger.handle(Remember((), (A,)))
    with pytest.raises(LedgerError, match="outside the model"):
        make().handle(Remember((PastUse(ExpertId(7, 0), -1, 0.0),), ()))
