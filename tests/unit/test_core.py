"""One sequence from its submission to its end, as the core tells it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from expertd_engine.core import EngineCore, StepFailed
from expertd_engine.errors import EngineError
from expertd_engine.messages import Constraint, SequenceStats, Steps, Submit
from expertd_engine.request import ConstraintFailed
from expertd_engine.step_plan import StepPlan
from support.builders_core import (
    EOS,
    STEP_EXPERTS,
    STEP_S,
    HashForward,
    Told,
    fail_once,
    make_core,
    make_scheduler,
    make_submit,
    next_token,
    run_alone,
    run_to_end,
)

PROMPT = [5, 6, 7]


def outputs_of(num_tokens: int) -> list[int]:
    """The first tokens that the toy model says after PROMPT, none of them masked."""
    history = list(PROMPT)
    for _ in range(num_tokens):
        history.append(next_token(history))
    return history[len(PROMPT) :]


def core_with(eos_token_id: int) -> EngineCore:
    return EngineCore(make_scheduler(), HashForward(), [eos_token_id])


def run_one(core: EngineCore, message: Submit) -> Told:
    core.submit(message, 0.0)
    return run_to_end(core)


def test_ends_with_length_at_max_tokens() -> None:
    told = run_alone(make_submit(max_tokens=4))
    assert told.tokens == {1: outputs_of(4)}
    assert told.reasons() == {1: "length"}


def test_ends_with_stop_at_eos_which_is_the_last_token_told() -> None:
    expected = outputs_of(3)
    told = run_one(core_with(expected[2]), make_submit(max_tokens=9))
    assert told.tokens == {1: expected}
    assert (told.finished[1].reason, told.finished[1].stop_token_id) == ("stop", None)


def test_a_stop_token_is_named() -> None:
    expected = outputs_of(3)
    told = run_alone(make_submit(max_tokens=9, stop_token_ids=[expected[2]]))
    assert told.tokens == {1: expected}
    assert (told.finished[1].reason, told.finished[1].stop_token_id) == ("stop", expected[2])


def test_eos_goes_on_when_ignored() -> None:
    expected = outputs_of(5)
    told = run_one(core_with(expected[2]), make_submit(max_tokens=5, ignore_eos=True))
    assert (told.tokens, told.reasons()) == ({1: expected}, {1: "length"})


def test_no_stop_before_min_tokens() -> None:
    expected = outputs_of(3)
    told = run_one(core_with(expected[2]), make_submit(max_tokens=9, min_tokens=6))
    assert expected[2] not in told.tokens[1][:6]
    assert len(told.tokens[1]) >= 6


def test_stop_wins_over_length_on_the_last_token() -> None:
    expected = outputs_of(3)
    assert run_one(core_with(expected[2]), make_submit(max_tokens=3)).reasons() == {1: "stop"}


@pytest.mark.parametrize("max_model_len", [3, 4, 6])
def test_ends_with_length_where_the_context_is_full(max_model_len: int) -> None:
    told = run_one(make_core(make_scheduler(max_model_len=max_model_len)), make_submit(max_tokens=99))
    assert told.tokens.get(1, []) == outputs_of(max_model_len - len(PROMPT))
    assert told.reasons() == {1: "length"}


def test_no_tokens_wanted_means_the_prompt_alone_in_chunks() -> None:
    core = make_core(make_scheduler(max_step_tokens=2))
    told = run_one(core, make_submit(max_tokens=0, prompt_logprobs=0))
    assert told.tokens == {1: []}
    assert told.reasons() == {1: "length"}
    assert [entry and entry.token_id for entry in told.prompt_logprobs[1]] == [None, 6, 7]


@pytest.mark.parametrize("max_step_tokens", [1, 2, 3, 64])
def test_prompt_logprobs_come_once_and_not_after_the_first_token(max_step_tokens: int) -> None:
    core = make_core(make_scheduler(max_step_tokens=max_step_tokens))
    core.submit(make_submit(max_tokens=3, prompt_logprobs=0), 0.0)
    seen = []
    while core.has_work:
        seen += [(output.prompt_logprobs is not None, len(output.token_ids)) for output in core.step(0.0).outputs]
    assert sum(has_prompt for has_prompt, _ in seen) == 1
    assert seen[0][0]


def test_a_refused_sequence_is_answered_with_its_reason() -> None:
    core = make_core(make_scheduler(max_model_len=2))
    told = run_one(core, make_submit(prompt=PROMPT))
    assert told.reasons() == {1: "error"}
    assert told.finished[1].error == "a prompt of 3 tokens: allowed are 1 to 2"


def test_a_failing_sequence_ends_and_its_batch_mates_go_on() -> None:
    scheduler = make_scheduler()
    core = make_core(scheduler, HashForward(before=fail_once(1, "disk on fire")))
    core.submit(make_submit(1), 0.0)
    core.submit(make_submit(2), 0.0)
    told = run_to_end(core)
    assert (told.finished[1].reason, told.finished[1].error) == ("error", "disk on fire")
    assert told.tokens == run_alone(make_submit(2)).tokens


def test_an_engine_that_stops_tells_the_end_of_all_that_lives() -> None:
    core = make_core(make_scheduler(max_sequences=1))
    for sequence_id in (1, 2):
        core.submit(make_submit(sequence_id), 0.0)
    core.step(0.0)
    assert [(f.sequence_id, f.reason) for f in core.end_all(1.0).finished] == [(1, "abort"), (2, "abort")]
    assert core.end_all(2.0) == Steps([], []) and not core.has_work


def test_abort_of_a_live_and_an_unknown_id() -> None:
    core = make_core()
    core.submit(make_submit(1), 0.0)
    core.abort([1, 2], 1.0)
    assert core.has_work
    steps = core.step(2.0)
    assert [(f.sequence_id, f.reason) for f in steps.finished] == [(1, "abort")]
    assert (core.has_work, core.step(3.0)) == (False, Steps([], []))


def test_abort_in_the_middle_of_a_step_drops_its_token() -> None:
    core = make_core(forward=(forward := HashForward()))
    forward.before = lambda plan: core.abort([1], 0.0)
    core.submit(make_submit(1, max_tokens=2), 0.0)
    core.submit(make_submit(2, max_tokens=2), 0.0)
    told = run_to_end(core)
    assert told.reasons() == {1: "abort", 2: "length"}
    assert set(told.tokens) == {2}


def test_abort_and_failure_of_the_same_step_end_it_once() -> None:
    core = make_core(forward=(forward := HashForward()))

    def before(plan: StepPlan) -> None:
        core.abort([1], 0.0)
        raise StepFailed([1], "too late")

    forward.before = before
    core.submit(make_submit(1), 0.0)
    assert run_to_end(core).reasons() == {1: "abort"}


def test_stats_of_a_whole_life() -> None:
    core = make_core(make_scheduler(max_step_tokens=2))
    core.submit(make_submit(max_tokens=3), 1.0)
    told = Told()
    for now_s in (3.0, 4.0, 5.0, 6.0):
        told.take(core.step(now_s))
    stats = told.finished[1].stats
    assert (stats.queue_s, stats.prefill_s, stats.decode_s) == (2.0, 1.0 + STEP_S, 2.0)
    assert (stats.expert_hits, stats.expert_late, stats.expert_misses) == (12, 8, 4)
    assert (stats.loaded_bytes, stats.stall_s) == (4 * 4096, 4 * STEP_EXPERTS.stall_s)


def test_stats_of_one_that_never_ran() -> None:
    core = make_core()
    core.submit(make_submit(), 1.0)
    core.abort([1], 4.0)
    assert core.step(5.0).finished[0].stats == SequenceStats(queue_s=3.0)


def test_preemptions_are_counted_and_change_no_token() -> None:
    core = make_core(make_scheduler(num_blocks=6))
    for sequence_id in (1, 2):
        core.submit(make_submit(sequence_id, max_tokens=12, ignore_eos=True), 0.0)
    told = run_to_end(core)
    assert [told.finished[i].stats.preemptions for i in (1, 2)] == [0, 1]
    alone = run_alone(make_submit(max_tokens=12, ignore_eos=True)).tokens[1]
    assert told.tokens == {1: alone, 2: alone}


def test_a_leak_is_found_when_idle() -> None:
    core = make_core(scheduler := make_scheduler())
    scheduler.pool.allocate(1)
    with pytest.raises(EngineError, match="1 in use"):
        core.step(0.0)


@dataclass
class Saying:
    """A constrainer: the answer is exactly `answer`. Keeps what it was told."""

    answer: list[int]
    told: list[int] = field(default_factory=list)

    def allowed(self) -> bytes:
        if self.told != self.answer[: len(self.told)]:
            raise ConstraintFailed("off the path")
        return (1 << self.answer[len(self.told)]).to_bytes(8, "little")

    def accept(self, token_id: int) -> None:
        self.told.append(token_id)

    @property
    def is_finished(self) -> bool:
        return self.told == self.answer


def constrained_core(saying: Saying) -> EngineCore:
    scheduler = make_scheduler()
    return EngineCore(scheduler, HashForward(scheduler.pool.block_tokens), [EOS], lambda constraint: saying)


def test_a_sequence_ends_when_its_constraint_is_met() -> None:
    free = run_alone(make_submit(1, max_tokens=6, ignore_eos=True)).tokens[1]
    saying = Saying(free[:3])
    core = constrained_core(saying)
    core.submit(make_submit(1, max_tokens=6, ignore_eos=True, constraint=Constraint("json_object")), 0.0)
    told = run_to_end(core)
    assert told.tokens[1] == saying.told == free[:3]
    assert (told.finished[1].reason, told.finished[1].constraint_met) == ("stop", True)


def test_a_constraint_hears_nothing_of_a_step_that_failed() -> None:
    saying = Saying([99])
    scheduler = make_scheduler()
    forward = HashForward(scheduler.pool.block_tokens, before=fail_once(2))
    core = EngineCore(scheduler, forward, [EOS], lambda constraint: saying)
    core.submit(make_submit(1, max_tokens=3, ignore_eos=True, constraint=Constraint("json_object")), 0.0)
    core.submit(make_submit(2), 0.0)
    told = run_to_end(core)
    assert told.tokens[1] == saying.told
    assert told.reasons() == {1: "length", 2: "error"}


def test_a_constraint_that_cannot_be_made_ends_its_sequence_alone() -> None:
    core = make_core()
    core.submit(make_submit(1, constraint=Constraint("regex", "a")), 0.0)
    core.submit(make_submit(2, max_tokens=1), 0.0)
    told = run_to_end(core)
    assert told.finished[1].reason == "error"
    assert "cannot hold an answer to a regex" in (told.finished[1].error or "")
    assert told.finished[2].reason in ("stop", "length")


def test_each_sequence_is_said_to_have_begun_once_and_with_its_first_step() -> None:
    core = core_with(EOS)
    core.submit(make_submit(max_tokens=3), 0.0)
    begun = [core.step(float(i)).started for i in range(2)]
    core.submit(make_submit(sequence_id=2, max_tokens=1), 2.0)
    begun += [core.step(2.0).started]
    assert begun == [[1], [], [2]]
