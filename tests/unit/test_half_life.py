from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.half_life import CANDIDATES, HalfLives
from expertd_engine.experts.policy import AdaptiveNextUse, Facts

EXPERTS, SLOTS, PER_TOKEN = 64, 16, 4


def popular(rng: Random, token: int) -> set[int]:
    """A few experts are always in demand; the others are anyone's."""
    return set(rng.sample(range(12), 2) + rng.sample(range(12, EXPERTS), 2))


def drifting(rng: Random, token: int) -> set[int]:
    """What is in use is used again and again, until something else is."""
    first = token // 12 * 7
    return {(first + rng.randrange(18)) % EXPERTS for _ in range(PER_TOKEN)}


def after(half_lives: HalfLives, uses: Callable[[Random, int], set[int]], tokens: int, lookup: int = 0) -> int:
    rng = Random(0)
    for token in range(tokens):
        half_lives.judge(lookup)
        for expert in sorted(uses(rng, token)):
            lookup += 1
            half_lives.use((0, expert), lookup)
    return lookup


def test_where_some_are_always_in_demand_uses_are_remembered_for_long() -> None:
    half_lives = HalfLives([EXPERTS], PER_TOKEN)
    half_lives.slots = SLOTS
    assert half_lives.current == round(CANDIDATES[0] * PER_TOKEN)
    lookup = after(half_lives, popular, 400)
    assert half_lives.current > round(CANDIDATES[0] * PER_TOKEN)
    after(half_lives, drifting, 1000, lookup)
    assert half_lives.current == round(CANDIDATES[0] * PER_TOKEN), "and other traffic changes it"


def test_where_all_fits_or_nothing_is_known_of_the_cache_nothing_changes() -> None:
    for slots in (0, EXPERTS):
        half_lives = HalfLives([EXPERTS], PER_TOKEN)
        half_lives.slots = slots
        after(half_lives, popular, 400)
        assert half_lives.current == round(CANDIDATES[0] * PER_TOKEN)


def test_a_change_keeps_the_order_of_all_and_ages_otherwise_from_then_on() -> None:
    half_lives = HalfLives([EXPERTS], PER_TOKEN)
    policy = AdaptiveNextUse(half_lives)
    known = [Facts(ExpertId(0, expert)) for expert in range(EXPERTS)]
    policy.adapt(0, SLOTS, known)
    rng, lookup, changes = Random(0), 0, 0
    for token in range(400):
        order = sorted(known, key=policy.rank)
        if policy.adapt(lookup, SLOTS, known):
            changes += 1
            assert sorted(known, key=policy.rank) == order
            used = max((one for one in known if one.last_use >= 0), key=policy.rank)
            before = policy.rank(used) - lookup / policy.half_life
            assert before == pytest.approx(0, abs=12), "still a count, in halvings"
        for expert in sorted(popular(rng, token)):
            lookup += 1
            known[expert].last_use = lookup
            policy.used(known[expert])
    assert changes >= 1
