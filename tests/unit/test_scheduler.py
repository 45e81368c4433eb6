from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from expertd_engine.batching import Batching
from expertd_engine.errors import EngineError
from expertd_engine.messages import ExpertMode
from expertd_engine.request import Sequence, SequenceState
from expertd_engine.scheduler import Scheduler, SequenceRefused
from expertd_engine.step_plan import SchedulerLimits, StepPlan
from support.builders_core import make_scheduler, make_sequence


def schedule(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def answer(scheduler: Scheduler, plan: StepPlan) -> None:
    """Every sampled token is 9; a sequence at its full length ends."""
    sampled = {chunk.sequence.sequence_id: 9 for chunk in plan.chunks if chunk.samples}
    for chunk in scheduler.update_from_output(plan, sampled):
        if chunk.sequence.num_tokens >= chunk.sequence.max_length:
            scheduler.finish(chunk.sequence, "length")


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(c.sequence.sequence_id, c.start, c.num_tokens, c.samples) for c in plan.chunks]


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for sequence in sequences:
        scheduler.add(sequence)


def test_no_sequences_no_step() -> None:
    assert make_scheduler().schedule() is None


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_samples() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    add(scheduler, make_sequence(1, range(10)))
    shapes = []
    for _ in range(4):
        shapes += shape(plan := schedule(scheduler))
        answer(scheduler, plan)
    assert shapes == [(1, 0, 4, False), (1, 4, 4, False), (1, 8, 2, True), (1, 10, 1, True)]


def test_decodes_come_before_prefill_which_gets_the_rest_of_the_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    add(scheduler, make_sequence(1, [1, 2]), make_sequence(2, [1, 2]))
    answer(scheduler, schedule(scheduler))
    add(scheduler, make_sequence(3, range(10)))
    plan = schedule(scheduler)
    assert shape(plan) == [(1, 2, 1, True), (2, 2, 1, True), (3, 0, 2, False)]
    assert (plan.num_tokens, plan.phase) == (4, "prefill")


def test_a_prefill_of_lower_rank_does_not_take_a_decodes_token() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    add(scheduler, make_sequence(2, [1, 2], priority=1))
    answer(scheduler, schedule(scheduler))
    add(scheduler, make_sequence(1, range(10)))
    answer(scheduler, plan := schedule(scheduler))
    assert shape(plan) == [(2, 2, 1, True), (1, 0, 3, False)]
    assert shape(schedule(scheduler)) == [(1, 3, 3, False), (2, 3, 1, True)]


def test_decodes_alone_leave_a_token_for_a_row_that_prefills() -> None:
    scheduler = make_scheduler(max_step_tokens=3, max_sequences=8)
    add(scheduler, *(make_sequence(i, [1]) for i in range(2)))
    answer(scheduler, schedule(scheduler))
    add(scheduler, make_sequence(7, range(5)), make_sequence(8, [1]))
    plan = schedule(scheduler)
    assert shape(plan) == [(0, 1, 1, True), (1, 1, 1, True), (7, 0, 1, False)]
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 1)


def test_a_step_holds_at_most_max_sequences_rows() -> None:
    scheduler = make_scheduler(max_sequences=2)
    add(scheduler, *(make_sequence(i) for i in range(3)))
    assert len(schedule(scheduler).chunks) == 2


def test_phase_is_decode_without_prompt_tokens() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_sequence())
    answer(scheduler, schedule(scheduler))
    assert schedule(scheduler).phase == "decode"


def test_priority_then_arrival() -> None:
    scheduler = make_scheduler(max_sequences=1)
    add(scheduler, make_sequence(1, priority=1), make_sequence(2), make_sequence(3), make_sequence(4, priority=-1))
    order = []
    while (plan := scheduler.schedule()) is not None:
        order.append(plan.chunks[0].sequence.sequence_id)
        scheduler.update_from_output(plan, {order[-1]: 9})
        scheduler.abort(order[-1])
    assert order == [4, 2, 3, 1]


def fill_pool() -> Scheduler:
    """Two running sequences that hold all four blocks of 4 tokens, and both need one more at the next step."""
    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, make_sequence(1, range(8), max_tokens=4), make_sequence(2, range(8), max_tokens=4))
    answer(scheduler, schedule(scheduler))
    assert scheduler.pool.free_blocks == 0
    return scheduler


def test_the_last_in_order_gives_way_when_blocks_run_out() -> None:
    scheduler = fill_pool()
    plan = schedule(scheduler)
    assert shape(plan) == [(1, 8, 1, True)]
    assert [s.sequence_id for s in plan.preempted] == [2]
    victim = plan.preempted[0]
    assert (victim.state, victim.block_table, victim.num_computed_tokens) == (SequenceState.PREEMPTED, [], 0)
    assert scheduler.num_preemptions == 1
    scheduler.check()


def test_one_that_joined_last_but_ranks_first_makes_the_others_give_way() -> None:
    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, make_sequence(1, range(8), max_tokens=4))
    answer(scheduler, schedule(scheduler))
    add(scheduler, make_sequence(2, range(4), max_tokens=9, priority=-1))
    answer(scheduler, schedule(scheduler))  # 1 takes its third block, 2 the fourth
    plan = schedule(scheduler)
    assert shape(plan) == [(2, 4, 1, True)]
    assert [s.sequence_id for s in plan.preempted] == [1]


def test_a_preempted_sequence_goes_before_later_ones_and_recomputes_its_output_as_prompt() -> None:
    scheduler = fill_pool()
    add(scheduler, make_sequence(3, range(4), max_tokens=4))
    while (plan := schedule(scheduler)).chunks[0].sequence.sequence_id == 1:
        assert len(plan.chunks) == 1
        answer(scheduler, plan)
    assert shape(plan) == [(2, 0, 9, True), (3, 0, 4, True)]
    assert plan.phase == "prefill"


def test_recomputed_outputs_are_prefill_even_past_the_prompt() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    sequence = make_sequence(1, range(4))
    sequence.output_token_ids = [9, 9, 9]
    sequence.prefill_end = 7
    add(scheduler, sequence)
    phases = []
    for _ in range(3):
        plan = schedule(scheduler)
        phases.append((plan.chunks[0].start, plan.phase))
        answer(scheduler, plan)
    assert phases == [(0, "prefill"), (4, "prefill"), (7, "decode")]


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    scheduler = fill_pool()
    add(scheduler, make_sequence(3, [1], max_tokens=4))
    assert [c.sequence.sequence_id for c in schedule(scheduler).chunks] == [1]


def test_waits_until_all_its_prompt_fits() -> None:
    scheduler = make_scheduler(num_blocks=5, max_step_tokens=6)
    add(scheduler, *(make_sequence(i, range(n), max_tokens=4) for i, n in [(1, 8), (2, 9), (3, 1)]))
    answer(scheduler, schedule(scheduler))
    plan = schedule(scheduler)
    assert shape(plan) == [(1, 6, 2, True)]
    assert scheduler.num_waiting == 2  # 3 would fit, but does not pass 2


def test_abort_while_waiting_running_preempted_and_finished() -> None:
    scheduler = fill_pool()
    add(scheduler, make_sequence(3, max_tokens=4))
    answer(scheduler, schedule(scheduler))
    for sequence_id in (1, 2, 3):
        sequence = scheduler.abort(sequence_id)
        assert sequence is not None
        assert sequence.finish_reason == "abort"
        assert scheduler.abort(sequence_id) is None
    assert (scheduler.has_sequences, scheduler.pool.used_blocks) == (False, 0)


def test_the_result_for_one_aborted_in_flight_is_dropped() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_sequence(1), make_sequence(2))
    plan = schedule(scheduler)
    scheduler.abort(1)
    assert [c.sequence.sequence_id for c in scheduler.update_from_output(plan, {1: 9, 2: 9})] == [2]
    assert plan.chunks[0].sequence.output_token_ids == []
    scheduler.check()


def test_a_failed_step_ends_those_named_and_leaves_the_others_as_they_were() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_sequence(1), make_sequence(2))
    plan = schedule(scheduler)
    assert [s.finish_reason for s in scheduler.step_failed(plan, [1])] == ["error"]
    assert shape(schedule(scheduler)) == [(2, 0, 3, True)]
    scheduler.check()


def test_a_failure_that_names_nobody_in_the_step_is_an_error() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_sequence(1))
    with pytest.raises(EngineError, match="step 0 failed by sequences \\[5\\]"):
        scheduler.step_failed(schedule(scheduler), [5])


def test_a_step_is_answered_exactly_once_before_the_next() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_sequence())
    plan = schedule(scheduler)
    with pytest.raises(EngineError, match="step 0 has not been answered"):
        scheduler.schedule()
    answer(scheduler, plan)
    with pytest.raises(EngineError, match="step 0 is not in flight"):
        answer(scheduler, plan)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (0, 1, "a prompt of 0 tokens: allowed are 1 to 30"),
        (31, 1, "a prompt of 31 tokens"),
        (9, 9, "up to 18 tokens needs 5 KV blocks of 4 tokens: there are 4"),
    ],
)
def test_what_can_never_run_is_refused(prompt: int, max_tokens: int, message: str) -> None:
    scheduler = make_scheduler(num_blocks=5, max_model_len=30)
    with pytest.raises(SequenceRefused, match=message):
        scheduler.add(make_sequence(1, range(prompt), max_tokens=max_tokens))
    assert not scheduler.has_sequences


def test_the_last_token_needs_no_block() -> None:
    scheduler = make_scheduler(num_blocks=5)
    scheduler.add(make_sequence(1, range(9), max_tokens=8))
    assert scheduler.has_sequences, "16 tokens are kept, for which the 4 blocks suffice"


def test_an_id_in_use_is_an_error() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_sequence())
    with pytest.raises(EngineError, match="its id is in use"):
        add(scheduler, make_sequence())


@pytest.mark.parametrize("name", SchedulerLimits.__slots__)
def test_limits_are_at_least_one(name: str) -> None:
    good = {"max_sequences": 1, "max_step_tokens": 1, "max_model_len": 1}
    with pytest.raises(ValueError, match=f"{name} is 0: it must be at least 1"):
        SchedulerLimits(**{**good, name: 0})


@pytest.mark.parametrize("batching", get_args(Batching))
def test_limits_given_between_steps_hold_in_the_next(batching: Batching) -> None:
    scheduler = make_scheduler(max_step_tokens=64, batching=batching)
    add(scheduler, make_sequence(1, range(9)))
    scheduler.limits = replace(scheduler.limits, max_step_tokens=2)
    assert shape(schedule(scheduler)) == [(1, 0, 2, False)]


def test_a_step_is_of_one_mode_and_modes_take_turns() -> None:
    scheduler = make_scheduler(max_mode_steps=2)
    add(scheduler, make_sequence(1, max_tokens=99), make_sequence(2, max_tokens=99, mode="virtual"))
    modes = []
    for _ in range(6):
        plan = schedule(scheduler)
        assert {c.sequence.mode for c in plan.chunks} == {plan.mode}
        modes.append(plan.mode)
        answer(scheduler, plan)
    assert modes == ["exact", "exact", "virtual", "virtual", "exact", "exact"]


def test_a_mode_alone_is_not_interrupted_and_the_other_is_not_kept_waiting_for_it() -> None:
    scheduler = make_scheduler(max_mode_steps=2)
    add(scheduler, make_sequence(1, max_tokens=99))
    for _ in range(5):
        answer(scheduler, schedule(scheduler))
    add(scheduler, make_sequence(2, mode="virtual"))
    assert schedule(scheduler).mode == "virtual"


def test_the_pool_cannot_shrink_below_what_a_live_sequence_may_need() -> None:
    scheduler = make_scheduler(num_blocks=20)
    add(scheduler, make_sequence(1, range(8), max_tokens=5))
    with pytest.raises(ValueError, match="num_blocks is 3: the live sequences need at least 4"):
        scheduler.resize_pool(3)
    scheduler.resize_pool(4)
    while (plan := scheduler.schedule()) is not None:
        answer(scheduler, plan)
    scheduler.check()


def finishes_within(scheduler: Scheduler, sequence: Sequence, rival_priority: int, steps: int) -> bool:
    """Whether `sequence` ends although two rivals arrive before every step, more than there is room for."""
    for step in range(steps):
        for rival in range(2):
            mode: ExpertMode = "virtual" if step % 2 else "exact"
            scheduler.add(
                make_sequence(100 + 2 * step + rival, range(6), max_tokens=4, priority=rival_priority, mode=mode)
            )
        answer(scheduler, schedule(scheduler))
        scheduler.check()
        if sequence.state is SequenceState.FINISHED:
            return True
    return False


@pytest.mark.parametrize("mode", ["exact", "virtual"])
@pytest.mark.parametrize("rival_priority", [0, -3])
def test_nobody_starves_under_endless_arrivals(rival_priority: int, mode: ExpertMode) -> None:
    """The pool holds exactly the longest sequence, so every rival is in its way."""
    scheduler = make_scheduler(num_blocks=6, max_step_tokens=5, ageing_steps=4, max_mode_steps=2)
    sequence = make_sequence(1, range(14), max_tokens=7, mode=mode)
    scheduler.add(make_sequence(2, range(6), max_tokens=8))
    scheduler.add(sequence)
    assert finishes_within(scheduler, sequence, rival_priority, 200)


def test_check_notices_a_block_that_is_in_no_table() -> None:
    scheduler = make_scheduler()
    scheduler.pool.allocate(1)
    with pytest.raises(EngineError, match="0 blocks in tables, 1 in use"):
        scheduler.check()
