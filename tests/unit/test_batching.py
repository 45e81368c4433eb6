"""Who computes in a step: few experts for many tokens, and nobody waits for ever."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_engine.batching import Batching, Candidate, PacedRoom, Share, expert_aware, prefill_first
from expertd_engine.core import EngineCore
from expertd_engine.paths import Paths, PathShape, Routes
from expertd_engine.request import Sequence
from support.builders_core import HashForward, make_scheduler, make_submit, run_alone, run_to_end

EXPERTS = 5


def decode(*experts: int, waited: int = 0) -> Candidate:
    return Candidate(1, False, waited, frozenset(experts))


def prompt(tokens: int, *experts: int, waited: int = 0) -> Candidate:
    return Candidate(tokens, True, waited, frozenset(experts))


def indices(shares: list[Share]) -> list[int]:
    return [share.place for share in shares]


candidates = st.lists(
    st.builds(
        lambda tokens, waited, experts: Candidate(tokens, tokens > 1, waited, experts),
        st.one_of(st.just(1), st.integers(1, 30)),
        st.integers(0, 12),
        st.frozensets(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS),
    ),
    min_size=1,
    max_size=12,
)


@given(candidates, st.integers(1, 40), st.integers(1, 10))
def test_a_step_is_filled_as_far_as_there_is_anything_and_never_beyond(
    those: list[Candidate], max_tokens: int, patience: int
) -> None:
    for shares in (expert_aware(those, max_tokens, patience, EXPERTS), prefill_first(those, max_tokens)):
        assert len(set(indices(shares))) == len(shares)
        assert all(1 <= share.tokens <= those[share.place].tokens for share in shares)
        assert sum(share.tokens for share in shares) == min(max_tokens, sum(one.tokens for one in those))


@given(candidates, st.integers(1, 40), st.integers(1, 4))
def test_a_step_takes_no_more_experts_than_there_is_room_for(
    those: list[Candidate], max_tokens: int, room: int
) -> None:
    shares = expert_aware(those, max_tokens, 6, room)
    assert 1 <= sum(share.tokens for share in shares) <= max_tokens
    used = frozenset().union(*(those[share.place].experts for share in shares))
    assert len(used) <= max(room, *(len(those[share.place].experts) for share in shares))


@given(candidates, st.integers(1, 6), st.integers(1, 6), st.integers(1, EXPERTS), st.data())
def test_nobody_is_passed_over_more_often_than_the_bound(
    those: list[Candidate], max_tokens: int, patience: int, room: int, data: st.DataObject
) -> None:
    """Whoever was served comes again at once, with whatever experts tempt the batching most."""
    those = [replace(one, waited=0) for one in those]
    tempting = data.draw(st.frozensets(st.integers(0, EXPERTS - 1), max_size=2))
    for _ in range(4 * (patience + len(those))):
        served = set(indices(expert_aware(those, max_tokens, patience, room, tempting)))
        those = [
            replace(one, waited=0, experts=tempting) if i in served else replace(one, waited=one.waited + 1)
            for i, one in enumerate(those)
        ]
        assert max(one.waited for one in those) <= patience + len(those) - 1


def test_the_longest_queue_goes_first_and_whoever_needs_no_further_expert_with_it() -> None:
    those = [decode(1), decode(2), decode(3), decode(2), decode(2)]
    assert indices(expert_aware(those, 3, 8, EXPERTS)) == [1, 3, 4]
    assert indices(expert_aware([decode(1), decode(2, 3), decode(2, 3), decode(2)], 3, 8, EXPERTS)) == [0, 1, 2]
    assert indices(expert_aware([prompt(4, 1, 2), decode(3), decode(1), decode(2)], 6, 8, EXPERTS)) == [0, 2, 3]


def test_of_queues_that_are_worth_the_same_the_first_in_order_goes() -> None:
    assert indices(expert_aware([decode(4), decode(2)], 1, 8, EXPERTS)) == [0]


def test_the_experts_of_the_step_before_go_on_and_others_wait_for_room() -> None:
    those = [decode(1), decode(1), decode(2), decode(3), prompt(9, 2), prompt(9, 1, 4)]
    assert indices(expert_aware(those, 20, 8, 1, frozenset({2}))) == [4, 2]
    assert indices(expert_aware(those, 20, 8, 2, frozenset({2, 3}))) == [4, 2, 3]


def test_whoever_waited_too_long_goes_before_the_longest_queue() -> None:
    those = [decode(1), decode(1), decode(1), decode(4, waited=8), decode(3, waited=9)]
    assert indices(expert_aware(those, 2, 8, EXPERTS)) == [4, 3]
    assert indices(expert_aware(those, 9, 8, 1)) == [4]


def test_a_prompt_that_waited_leaves_tokens_for_decodes_that_did() -> None:
    those = [prompt(50, 1, waited=9), decode(2, waited=8), decode(3, waited=8), decode(1)]
    assert expert_aware(those, 10, 8, EXPERTS) == [Share(0, 8), Share(1, 1), Share(2, 1)]


def paced(compute_s: float, read_s: float) -> PacedRoom:
    """Slots for 2 experts of 100 bytes, told of a step that reads nothing and of one that reads one."""
    room = PacedRoom(lambda: 2, 100)
    room.stepped(compute_s, 0, 0.0)
    room.stepped(9.0, 100, read_s)
    return room


def test_nobody_is_held_back_for_reads_that_computing_hides() -> None:
    assert PacedRoom(lambda: 2, 100)(6) == 2, "nothing is known yet"
    assert paced(compute_s=1.0, read_s=0.2)(6) == 6, "the four without a slot are read in 0.8 s"
    assert paced(compute_s=1.0, read_s=0.3)(6) == 2
    assert paced(compute_s=1.0, read_s=0.3)(5) == 5, "fewer wait"
    assert paced(compute_s=1.0, read_s=9.0)(2) == 2


def test_the_pace_of_reads_is_followed() -> None:
    room = paced(compute_s=1.0, read_s=0.1)
    assert room(6) == 6
    for step in range(2, 30):
        room.stepped(9.0, 100 * step, 0.1 + 2.0 * step)
    assert room(6) == 2


def test_prompts_before_answers() -> None:
    assert prefill_first([decode(), prompt(3), decode(), prompt(9)], 6) == [Share(1, 3), Share(3, 3)]
    assert prefill_first([decode(), prompt(3)], 6) == [Share(1, 3), Share(0, 1)]


def expert_of(token_id: int) -> int:
    return token_id % EXPERTS


def find_paths(sequences: object) -> None:
    """A router that reads tokens alone."""
    assert isinstance(sequences, list)
    for sequence in sequences:
        assert isinstance(sequence, Sequence)
        sequence.paths = sequence.paths or Paths(PathShape(1, 1))
        experts = [expert_of(t) for t in sequence.tokens(len(sequence.paths), sequence.num_tokens)]
        sequence.paths.extend(Routes(array("q", experts), array("f", [1.0] * len(experts))), 0, len(experts))


@pytest.mark.parametrize("batching", ["expert-aware", "prefill-first"])
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["exact", "virtual"])), max_size=9),
    st.integers(1, 5),
    st.integers(6, 20),
    st.booleans(),
)
def test_answers_do_not_depend_on_the_batching(
    batching: Batching, requests: list[tuple[int, int, str]], max_step_tokens: int, num_blocks: int, prefix_cache: bool
) -> None:
    scheduler = make_scheduler(
        num_blocks=num_blocks, block_tokens=4, max_step_tokens=max_step_tokens, prefix_cache=prefix_cache,
        batching=batching, patience_steps=3,
    )  # fmt: skip
    core = EngineCore(scheduler, HashForward(4), [0], foresee=find_paths)
    messages = [
        make_submit(i, range(7 * i % 5, 7 * i % 5 + prompt_tokens), max_tokens=answer, mode=mode)  # type: ignore[arg-type]  # a mode
        for i, (prompt_tokens, answer, mode) in enumerate(requests)
    ]
    for message in messages:
        core.submit(message, 0.0)
    told = run_to_end(core, max_steps=600)
    for message in messages:
        assert told.tokens[message.sequence_id] == run_alone(message).tokens[message.sequence_id]
    scheduler.check()
    if batching == "expert-aware" and not scheduler.num_preemptions:
        assert scheduler.chooser.most_passed_over <= 3 + len(requests)


def test_more_may_run_than_one_step_has_tokens_for_and_they_step_by_experts() -> None:
    scheduler = make_scheduler(max_step_tokens=3, max_sequences=6, batching="expert-aware")
    forward = HashForward(4)
    core = EngineCore(scheduler, forward, [0], foresee=find_paths)
    for i in range(6):
        core.submit(make_submit(i, [i % 2 + 5], max_tokens=20, ignore_eos=True), 0.0)
    run_to_end(core)
    unique = [{expert_of(c.sequence.tokens(c.start, c.stop)[0]) for c in plan.chunks} for plan in forward.plans]
    full = [len(experts) for experts, plan in zip(unique, forward.plans, strict=True) if plan.num_tokens == 3]
    assert scheduler.chooser.most_passed_over > 0
    assert sum(full) / len(full) < 2
