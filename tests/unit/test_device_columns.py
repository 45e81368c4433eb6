"""Facts in columns say and do what facts one by one do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_engine.experts.device_columns import ColumnUses
from expertd_engine.experts.device_uses import Uses
from expertd_engine.experts.policy import serving_policy

COUNTS = (5, 3, 4)
NUMBERS = st.integers(0, sum(COUNTS) - 1)
HISTORY = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.lists(NUMBERS, unique=True, min_size=1)),
        st.tuples(st.just("offer"), NUMBERS),
        st.tuples(st.just("withdraw"), NUMBERS),
        st.tuples(st.just("doubt"), NUMBERS),
        st.tuples(st.just("foresee"), NUMBERS, st.integers(0, 50)),
        st.tuples(st.just("forget"), NUMBERS),
        st.tuples(st.just("take")),
        st.tuples(st.just("anew")),
    ),
    min_size=10,
    max_size=80,
)


class Followed:
    """What a history does to uses; every lookup so far is of a different number, so no two experts rank alike."""

    def __init__(self, uses: Uses) -> None:
        self.uses, self.lookups = uses, 0
        self.apply(("use", list(range(sum(COUNTS)))))

    def apply(self, act: tuple[object, ...]) -> object:
        match act:
            case ("use", list() as numbers):
                self.uses.use(numbers, self.lookups)
                self.lookups += len(numbers)
            case ("take",):
                return self.uses.victims.take().expert if len(self.uses.victims) else None
            case ("anew",):
                self.uses.victims.rank_anew()
            case (str() as what, int() as number, *more):
                self._one(what, number, *more)
        return None

    def _one(self, what: str, number: int, *position: object) -> None:
        facts, victims = self.uses.facts[number], self.uses.victims
        if what == "withdraw":
            victims.withdraw(facts)
        elif what == "foresee":
            assert isinstance(position[0], int)
            facts.next_use = max(position[0], facts.next_use or 0)
            victims.offer(facts)
        else:
            facts.probation = facts.probation or what == "doubt"
            facts.next_use = None if what == "forget" else facts.next_use
            victims.offer(facts)


@pytest.mark.parametrize("name", ["lru", "lfu", "next-use"])
@given(history=HISTORY)
def test_columns_are_the_facts_one_by_one(name: str, history: list[tuple[object, ...]]) -> None:
    plain, columns = (Followed(kind(COUNTS, serving_policy(name, COUNTS, 2))) for kind in (Uses, ColumnUses))
    for act in history:
        assert plain.apply(act) == columns.apply(act), act
        assert len(plain.uses.victims) == len(columns.uses.victims)
    for one, other in zip(plain.uses.facts, columns.uses.facts, strict=True):
        assert other.weight == pytest.approx(one.weight, abs=1e-9)
        assert (other.last_use, other.next_use, other.probation) == (one.last_use, one.next_use, one.probation)
