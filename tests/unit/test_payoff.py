from __future__ import annotations

import math
from random import Random

import pytest

from expertd_engine.experts.payoff import BLOCK, COST, FIRST, GRACE, HOLD, LONGEST, NOTICE, SETTLED, TRIAL, PayOff


def run(payoff: PayOff, steps: int, *, on_s: float, off_s: float, rows: int | None = 1, noise: float = 0.0) -> int:
    """Steps that take so long with and without foresight, the logarithm so noisy; how many were made with it."""
    rng, made = Random(steps), 0
    for _ in range(steps):
        on = payoff.begin_step(rows)
        assert on is payoff.is_on
        made += on
        payoff.end_step((on_s if on else off_s) * math.exp(noise * rng.gauss(0, 1)))
    return made


TRIAL_STEPS = BLOCK * len(TRIAL)


def test_what_makes_steps_slower_is_not_done_but_tried_again() -> None:
    payoff = PayOff()
    assert run(payoff, GRACE, on_s=1.1, off_s=1.0) == GRACE
    assert run(payoff, TRIAL_STEPS, on_s=1.1, off_s=1.0) == TRIAL_STEPS // 2
    assert run(payoff, HOLD, on_s=1.1, off_s=1.0) == 0 and payoff.switches == 1
    assert run(payoff, TRIAL_STEPS + HOLD, on_s=0.8, off_s=1.0) == TRIAL_STEPS // 2 + HOLD, "it pays now"
    assert (payoff.trials, payoff.switches) == (2, 2)


def test_what_is_confirmed_is_tried_less_often_and_what_changes_as_often_as_at_first() -> None:
    payoff = PayOff()
    run(payoff, GRACE, on_s=1.0, off_s=1.1)
    for hold in (2 * HOLD, 4 * HOLD, LONGEST, LONGEST):
        assert run(payoff, TRIAL_STEPS + hold, on_s=1.0, off_s=1.1) == TRIAL_STEPS // 2 + hold
    assert (payoff.trials, payoff.switches) == (4, 0)
    assert run(payoff, TRIAL_STEPS + HOLD, on_s=1.1, off_s=1.0) == TRIAL_STEPS // 2
    assert run(payoff, 1, on_s=1.0, off_s=1.1) == 1 and payoff.switches == 1, "the next trial begins"


@pytest.mark.parametrize("slower", [1.05, 1.5, 4.0])
def test_trials_of_what_does_not_pay_lose_half_a_hundredth_at_most(slower: float) -> None:
    payoff, lost = PayOff(in_doubt=False), 0.0
    run(payoff, FIRST, on_s=slower, off_s=1.0)
    steps = 40_000
    for _ in range(steps):
        on = payoff.begin_step(1)
        lost += (slower - 1) * on
        payoff.end_step(slower if on else 1.0)
    assert payoff.trials > 2 and lost / steps <= COST


def test_a_trial_that_cannot_tell_goes_on_for_a_while() -> None:
    sure, unsure = PayOff(), PayOff()
    run(sure, FIRST, on_s=1.2, off_s=1.0, noise=0.02)
    run(unsure, FIRST, on_s=1.0, off_s=1.0, noise=0.3)
    assert (sure.trials, unsure.trials) == (1, 0)
    run(unsure, SETTLED - FIRST, on_s=1.0, off_s=1.0, noise=0.3)
    assert unsure.trials == 1


def test_in_doubt_nothing_is_predicted_where_that_was_asked_for() -> None:
    """Of what is as quick, a chance's worth."""
    kept = 0
    for seed in range(20):
        payoff = PayOff(in_doubt=False)
        run(payoff, SETTLED + seed, on_s=1.0, off_s=1.0, noise=0.3)
        kept += payoff.is_on
    assert kept <= 3


def test_like_is_compared_with_like() -> None:
    payoff = PayOff()
    run(payoff, GRACE, on_s=1, off_s=1)
    for _ in range(TRIAL_STEPS - 1):  # two batches by turns: one of three rows takes longer
        run(payoff, 1, on_s=1.2, off_s=1.0)
        run(payoff, 1, on_s=3.2, off_s=3.0, rows=3)
    assert payoff.trials == 0
    run(payoff, 1, on_s=1.2, off_s=1.0)
    assert payoff.trials == 1 and payoff.switches == 1 and not payoff.is_on


def test_prompts_in_between_do_not_begin_a_trial_anew() -> None:
    payoff = PayOff()
    run(payoff, GRACE, on_s=1, off_s=1)
    for _ in range(TRIAL_STEPS // BLOCK):
        run(payoff, 1, on_s=99, off_s=1, rows=None)
        assert payoff.is_on and payoff.trials == 0
        run(payoff, BLOCK, on_s=1.2, off_s=1.0)
    assert payoff.trials == 1 and not payoff.is_on


def test_a_difference_within_the_margin_changes_nothing() -> None:
    payoff = PayOff()
    run(payoff, FIRST, on_s=1.005, off_s=1.0)
    assert payoff.trials == 1 and payoff.switches == 0 and payoff.is_on


def test_who_predicts_hears_of_a_trial_before_it_begins() -> None:
    payoff, near = PayOff(), []
    for steps in (0, FIRST, HOLD - NOTICE - 1, 1):
        run(payoff, steps, on_s=1.1, off_s=1.0)
        near.append(payoff.is_near)
    assert near == [True, False, False, True] and not payoff.is_on


def test_what_begins_off_is_off_until_a_trial_has_told() -> None:
    payoff = PayOff(in_doubt=False)
    payoff.begin_off()
    made = []
    for _ in range(SETTLED):
        payoff.begin_step(1)
        made.append(payoff.is_on)
        payoff.end_step(0.5 if payoff.is_on else 1.0)
    assert made[:GRACE] == [False] * GRACE and payoff.trials == 1 and payoff.is_on
