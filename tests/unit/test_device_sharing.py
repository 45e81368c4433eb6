"""The table of what a card's steps leave to the processor: rewritten between launches, emptied while the card alone is
quicker."""

from __future__ import annotations

from random import Random

import pytest

from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_sharing import Sharing
from expertd_engine.experts.device_streams import HostDevice
from expertd_engine.experts.payoff import BLOCK, FIRST, GRACE, HOLD, SETTLED, TRIAL, PayOff
from expertd_engine.planning.balance import SETTLED as BALANCED
from expertd_engine.planning.misses import Misses
from support.device_caches import make_cache
from support.fake_device import RECORD

SHAPES = [(3_000_000, 768), (3_000_000, 768), (1_000_000, 256)]
MOST = 4


def sharing(where: str = "both") -> Sharing:
    return Sharing(HostDevice(), Misses("both" if where == "both" else "cpu", 50e9, 60e9, 20e-6), SHAPES, MOST)


def step(one: Sharing, told: list[int], seconds: float = 1.0) -> list[list[list[int]]]:
    """One step, which reports and missed something; the table that it found."""
    one.begin_timed(1)
    one.before_launch(may_ask=True)
    assert one.later.tolist() == [0] * len(SHAPES), "of the step before"
    found: list[list[list[int]]] = one.splits.tolist()
    one.after_launch()
    for layer, word in enumerate(told):
        one.later[layer] = word
    one.end_step(asked=one.asks)
    one.end_timed(seconds, missed=1)
    return found


def balanced() -> Sharing:
    """One that has found its balance: the two sides are late by turns."""
    one = sharing()
    for number in range(BALANCED):
        step(one, [3 - number % 2] * len(SHAPES))
    return one


def test_who_is_later_changes_what_a_later_launch_finds() -> None:
    one = sharing()
    first = step(one, [3, 2, 0])
    assert first[0] == first[1] != first[2] and first[0][1][1] > 0, "one that is missing is divided"
    found = [step(one, [3, 3, 3]) for _ in range(20)]
    assert found[-1][0][1][1] > first[0][1][1] or found[-1][0][1] == [0, 0], "the processor is left less"
    status = one.as_status()
    assert status is not None and (status.later, status.earlier, status.is_on) == (61, 1, True)
    assert len(status.left) == MOST and status.left[0] < 1 - first[0][1][1] / 768
    assert status.cpu_bytes_per_s < 60e9


def test_a_step_that_fails_before_its_launch_tells_nothing() -> None:
    one = sharing()
    step(one, [3, 2, 0])
    one.end_step(asked=True)
    status = one.as_status()
    assert status is not None and (status.later, status.earlier) == (1, 1)


def test_while_a_card_alone_is_quicker_nobody_is_asked() -> None:
    one = balanced()
    for _ in range(SETTLED):
        one.begin_timed(1)
        step_s = 2.0 if one.payoff.is_on else 1.0
        assert one.before_launch(may_ask=True) is one.payoff.is_on
        one.end_step(asked=one.asks)
        one.end_timed(step_s, missed=1)
    assert (one.payoff.trials, one.payoff.is_on) == (1, False)
    before = one.as_status()
    step(one, [3, 3, 3])
    after = one.as_status()
    assert not one.asks and before is not None and after is not None and before.later == after.later
    assert FIRST < SETTLED < HOLD
    status = one.as_status()
    assert status is not None and (status.is_on, status.trials, status.switches) == (False, 1, 1)


def test_a_step_whose_program_cannot_ask_tells_the_balance_nothing() -> None:
    one = balanced()
    speed = [one.balance.cpu_bytes_per_s] if one.balance is not None else []
    for _ in range(100):
        assert not one.before_launch(may_ask=False)
        one.end_step(asked=one.asks)
    assert one.balance is not None and speed == [one.balance.cpu_bytes_per_s]


def test_steps_launched_behind_others_are_judged_by_what_each_asked() -> None:
    one = balanced()
    asked: list[bool] = []
    for number in range(SETTLED + 2):
        one.begin_timed(1, ahead=number > 0)
        asked.append(one.before_launch(may_ask=True))
        if number:
            one.end_step(asked=asked[-2])
            one.end_timed(2.0 if asked[-2] else 1.0, missed=1)
    assert {True, False} == set(asked)
    assert (one.payoff.trials, one.payoff.is_on, one.payoff.switches) == (1, False, 1)


def test_a_trial_ends_whatever_part_of_the_steps_is_no_measure() -> None:
    """Steps behind others, of which some miss nothing: blocks wait for as many that do."""
    for seed in range(20):
        one, rng, asked = balanced(), Random(seed), [True]
        one.begin_timed(1)
        one.before_launch(may_ask=True)
        for _ in range(4 * SETTLED):
            one.begin_timed(1, ahead=True)
            asked.append(one.before_launch(may_ask=True))
            one.end_step(asked=asked[-2])
            one.end_timed(2.0 if asked[-2] else 1.0, missed=int(rng.random() < 0.8))
        assert (one.payoff.trials, one.payoff.is_on) == (1, False)


def test_a_budget_that_changes_forgets_no_step_that_runs() -> None:
    payoff = PayOff()
    payoff.begin_step(1)
    payoff.begin_anew()
    payoff.begin_step(None, ahead=True)
    assert payoff.was_on and not payoff.is_timed
    payoff.end_step(1.0)
    payoff.begin_step(1)
    assert payoff.was_on


def test_nobody_is_asked_while_nothing_is_missed() -> None:
    one, asked = balanced(), []
    for missed in (*[0] * 12, 1, 0, 0):
        one.begin_timed(None)
        asked.append(one.before_launch(may_ask=True))
        one.end_step(asked=one.asks)
        one.end_timed(1.0, missed=missed)
    assert asked == [*[True] * 8, *[False] * 5, True, True]


def test_steps_that_missed_nothing_do_not_tell_whether_sharing_pays() -> None:
    one = balanced()
    for _ in range(SETTLED + HOLD):
        one.begin_timed(1)
        one.end_timed(2.0 if one.payoff.is_on else 1.0, missed=0)
    assert one.payoff.trials == 0


def test_a_step_that_asked_nobody_for_want_of_misses_does_not_tell_either() -> None:
    one, told = balanced(), 0
    for _ in range(SETTLED + HOLD):
        one.begin_timed(1)
        one.before_launch(may_ask=False)
        one.end_step(asked=False)
        one.end_timed(1.0, missed=1)
        told += one.payoff.trials
    assert told == 0


def test_nothing_is_tried_before_the_balance_is_found() -> None:
    one = sharing()
    for _ in range(SETTLED + HOLD):
        one.begin_timed(1)
        assert one.payoff.is_on
        one.end_timed(1.0, missed=1)
    assert one.payoff.trials == 0


def test_a_trial_compares_steps_of_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    one, cache = balanced(), make_cache(6, HostDevice())
    monkeypatch.setattr(DeviceCache, "sharing", one)

    def steps(count: int, shared_s: float) -> None:
        for _ in range(count):
            one.begin_timed(1)
            one.before_launch(may_ask=True)
            one.end_step(asked=one.asks)
            one.end_timed(shared_s if one.payoff.is_on else 1.0, missed=1)

    half, whole = (BLOCK * len(TRIAL) // 2, BLOCK * len(TRIAL))
    steps(GRACE + half, shared_s=0.5)
    cache.set_budget(4 * RECORD)
    steps(whole, shared_s=1.1)
    assert (one.payoff.trials, one.payoff.is_on, one.payoff.switches) == (1, False, 1), "half of it was of another one"
    cache.close()


def test_where_the_processor_has_all_nothing_is_balanced() -> None:
    one = sharing("cpu")
    assert step(one, [3, 3, 3]) == [[[n, 0] for n in range(MOST + 1)]] * len(SHAPES)
    assert one.as_status() is None and not one.divides
