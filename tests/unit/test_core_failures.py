"""Steps that fail by nobody in particular: who is to blame ends alone, the others lose time only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from expertd_engine.core import StepFailed
from expertd_engine.step_plan import StepPlan
from support.builders_core import HashForward, Told, make_core, make_submit, run_alone, run_to_end


def run_with_failures(fails: Callable[[StepPlan], bool], num_sequences: int, *, late: int = 0) -> Told:
    """Sequences 1 to n in one batch (the last `late` of them come after three steps); steps that `fails` names give
    up."""

    def before(plan: StepPlan) -> None:
        if fails(plan):
            raise StepFailed((), "disk on fire")

    core, told = make_core(forward=HashForward(before=before)), Told()
    messages = [make_submit(i, [i, 6, 7], max_tokens=6, ignore_eos=True) for i in range(1, num_sequences + 1)]
    for message in messages[: num_sequences - late]:
        core.submit(message, 0.0)
    for _ in range(3):
        told.take(core.step(0.0))
    for message in messages[num_sequences - late :]:
        core.submit(message, 0.0)
    return run_to_end(core, told, max_steps=200)


def alone(sequence_id: int) -> list[int]:
    return run_alone(make_submit(sequence_id, [sequence_id, 6, 7], max_tokens=6, ignore_eos=True)).tokens[sequence_id]


def held_by(sequence_id: int, plan: StepPlan) -> bool:
    return holds(plan, sequence_id)


def holds(plan: StepPlan, *sequence_ids: int) -> bool:
    return any(chunk.sequence.sequence_id in sequence_ids for chunk in plan.chunks)


@pytest.mark.parametrize("nth", range(9))
def test_a_step_that_fails_once_by_nobody_costs_nobody_anything(nth: int) -> None:
    told = run_with_failures(lambda plan: plan.step == nth, 3, late=1)
    assert told.tokens == {i: alone(i) for i in (1, 2, 3)}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("late", [0, 1])
def test_who_makes_every_step_fail_is_found_and_ends_alone(count: int, late: int) -> None:
    """Whichever place it has in the batch."""
    for guilty in range(1, count + 1):
        told = run_with_failures(partial(held_by, guilty), count, late=late)
        assert (told.finished[guilty].reason, told.finished[guilty].error) == ("error", "disk on fire")
        assert told.tokens == {i: alone(i) for i in range(1, count + 1) if i != guilty}


def test_several_at_fault_end_and_the_others_do_not() -> None:
    told = run_with_failures(lambda plan: holds(plan, 2, 3, 7), 8, late=3)
    assert told.tokens == {i: alone(i) for i in (1, 4, 5, 6, 8)}


def test_where_every_step_fails_every_sequence_ends() -> None:
    told = run_with_failures(lambda plan: True, 8, late=2)
    assert told.reasons() == dict.fromkeys(range(1, 9), "error")


def test_an_abort_among_those_on_trial_ends_once() -> None:
    calls: list[int] = []

    def before(plan: StepPlan) -> None:
        calls.append(plan.step)
        if len(calls) == 2:
            core.abort([1, 3], 0.0)
        if len(calls) <= 2:
            raise StepFailed((), "disk on fire")

    core = make_core(forward=HashForward(before=before))
    for sequence_id in (1, 2, 3, 4):
        core.submit(make_submit(sequence_id), 0.0)
    assert {i for i, reason in run_to_end(core).reasons().items() if reason == "abort"} == {1, 3}
