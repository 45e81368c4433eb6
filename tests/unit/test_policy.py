from __future__ import annotations

import math

import pytest

from expertd_engine.errors import ConfigError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.policy import LFU, LRU, Facts, NextUse, Victims, make_policy


def facts(expert: int, last_use: int = 0, next_use: int | None = None, probation: bool = False) -> Facts:
    return Facts(ExpertId(0, expert), last_use, next_use, probation=probation)


def drain(victims: Victims) -> list[int]:
    return [victims.take().expert.expert for _ in range(len(victims))]


def test_lru_gives_the_least_recently_used_first() -> None:
    victims = Victims(LRU())
    for expert, last_use in enumerate((5, 3, 9)):
        victims.offer(facts(expert, last_use))
    assert drain(victims) == [1, 0, 2]


def test_who_rose_since_it_was_offered_goes_where_it_belongs() -> None:
    victims, known = Victims(NextUse(half_life=100)), [facts(expert, expert) for expert in range(4)]
    for each in known:
        victims.offer(each)
    known[0].last_use = 9
    known[1].next_use = 50
    for each in known[:2]:
        victims.rose(each)
    assert drain(victims) == [2, 3, 0, 1]


def test_next_use_gives_unknown_then_furthest_first_and_ties_by_recency() -> None:
    victims = Victims(NextUse(half_life=100))
    for expert, (last_use, next_use) in enumerate([(1, 10), (4, None), (2, 30), (3, None), (0, 10)]):
        victims.offer(facts(expert, last_use, next_use))
    assert drain(victims) == [3, 1, 2, 4, 0]


def test_next_use_gives_the_least_frequent_of_the_unknown_first() -> None:
    policy = NextUse(half_life=1000)
    often, lately, known = facts(0), facts(1), facts(2, next_use=10**9)
    for expert, uses in ((often, (0, 1, 2)), (lately, (50,)), (known, (0,))):
        for now in uses:
            expert.last_use = now
            policy.used(expert)
    victims = Victims(policy)
    for expert in (known, often, lately):
        victims.offer(expert)
    assert drain(victims) == [1, 0, 2]


@pytest.mark.parametrize("uses, first", [((0, [0, 1, 2]), 1), ((0, [0]), 0)])
def test_lfu_gives_the_least_frequent_first(uses: tuple[int, list[int]], first: int) -> None:
    policy, victims = LFU(half_life=1000), Victims(LFU(half_life=1000))
    often, once = facts(0), facts(1)
    for now in uses[1]:
        often.last_use = now
        policy.used(often)
    once.last_use = 3
    policy.used(once)
    victims.offer(often)
    victims.offer(once)
    assert drain(victims)[0] == first


def test_lfu_halves_a_use_after_its_half_life() -> None:
    policy, old, new = LFU(half_life=100), facts(0), facts(1)
    for expert, uses in ((old, (0, 0)), (new, (100,))):
        for now in uses:
            expert.last_use = now
            policy.used(expert)
    assert policy.rank(old) == pytest.approx(policy.rank(new))


def test_lfu_stays_finite_over_a_long_life() -> None:
    policy, expert = LFU(half_life=1), facts(0)
    for now in (0, 10**6, 10**9):
        expert.last_use = now
        policy.used(expert)
    assert math.isfinite(policy.rank(expert))


def test_probation_goes_before_any_rank() -> None:
    victims = Victims(LRU())
    victims.offer(facts(0, last_use=1))
    victims.offer(facts(1, last_use=9, probation=True))
    assert drain(victims) == [1, 0]


def test_offering_again_moves_and_withdrawing_removes() -> None:
    victims = Victims(NextUse(half_life=100))
    first, second, third = facts(0, next_use=10), facts(1, next_use=20), facts(2, next_use=30)
    for expert in (first, second, third):
        victims.offer(expert)
    first.next_use = 99
    victims.offer(first)
    victims.withdraw(third)
    victims.withdraw(third)
    assert drain(victims) == [0, 1]


def test_what_is_needed_sooner_is_passed_over_and_stays() -> None:
    victims = Victims(LRU())
    for expert, next_use in enumerate((5, 7, 6)):
        victims.offer(facts(expert, last_use=expert, next_use=next_use))
    taken = victims.take_needed_after(6)
    assert taken is not None and taken.expert.expert == 1
    assert victims.take_needed_after(6) is None
    assert drain(victims) == [0, 2]


def test_many_changes_leave_no_stale_entry_on_top() -> None:
    victims, experts = Victims(LRU()), [facts(i) for i in range(5)]
    for now in range(1000):
        experts[now % 5].last_use = now
        victims.offer(experts[now % 5])
    assert len(victims) == 5
    assert drain(victims) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["lru", "lfu", "next-use"])
def test_policies_are_made_by_name(name: str) -> None:
    assert make_policy(name).name == name


def test_unknown_policy_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"'fifo' is not known: choose from lru, lfu, next-use"):
        make_policy("fifo")
