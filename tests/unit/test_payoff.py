from __future__ import annotations

from random import Random

from expertd_engine.experts.payoff import BLOCK, GRACE, HOLD, TRIAL, PayOff


def run(payoff: PayOff, steps: int, *, on_s: float, off_s: float, rows: int | None = 1, noise: float = 0.0) -> int:
    """Steps that take so long with and without foresight; how many were made with it."""
    rng, made = Random(steps), 0
    for _ in range(steps):
        on = payoff.begin_step(rows)
        assert on is payoff.is_on
        made += on
        payoff.end_step((on_s if on else off_s) * (1 + noise * rng.random()))
    return made


TRIAL_STEPS = BLOCK * len(TRIAL)


def test_what_makes_steps_slower_is_not_done_but_tried_again() -> None:
    payoff = PayOff()
    assert run(payoff, GRACE, on_s=1.2, off_s=1.0) == GRACE
    assert run(payoff, TRIAL_STEPS, on_s=1.2, off_s=1.0) == TRIAL_STEPS // 2
    assert run(payoff, HOLD, on_s=1.2, off_s=1.0) == 0 and payoff.switches == 1
    assert run(payoff, TRIAL_STEPS + HOLD, on_s=0.8, off_s=1.0) == TRIAL_STEPS // 2 + HOLD, "it pays now"
    assert (payoff.trials, payoff.switches) == (2, 2)


def test_what_pays_is_kept_and_trials_cost_little() -> None:
    payoff = PayOff()
    steps = GRACE + 10 * (TRIAL_STEPS + HOLD)
    assert run(payoff, steps, on_s=1.0, off_s=1.3, noise=0.2) == steps - 10 * TRIAL_STEPS // 2
    assert payoff.trials == 10 and payoff.switches == 0


def test_in_the_long_run_nothing_is_lost_by_it() -> None:
    """At worst, where foresight costs half of a step: 97 % of the speed without."""
    payoff, total = PayOff(), 0.0
    steps = GRACE + 20 * (TRIAL_STEPS + HOLD)
    for _ in range(steps):
        seconds = 1.5 if payoff.begin_step(1) else 1.0
        total += seconds
        payoff.end_step(seconds)
    assert steps / total > 0.97


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
    run(payoff, GRACE + TRIAL_STEPS, on_s=1.005, off_s=1.0)
    assert payoff.trials == 1 and payoff.switches == 0 and payoff.is_on
