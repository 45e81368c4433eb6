"""What is told of routes that are known ahead: this step's uses, later ones, and nothing where nothing can be lost."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.pregated import PregatedLookahead, later_unions, step_union
from expertd_engine.paths import Paths, PathShape, Routes, Union
from expertd_engine.request import Sequence as EngineSequence
from expertd_engine.step_plan import StepPlan
from support.builders_core import make_scheduler, make_sequence

LAYERS, EXPERTS = 3, 4


def one_head(*experts: int) -> Union:
    return (frozenset(experts),)


class Slots:
    """Where experts are: those of `resident` in any slot."""

    def __init__(self, *resident: tuple[int, int]) -> None:
        self.resident = set(resident)

    def __call__(self, layer: int) -> Sequence[int]:
        return [0 if (layer, expert) in self.resident else -1 for expert in range(EXPERTS)]


def everywhere(*experts: int) -> list[tuple[int, int]]:
    return [(layer, expert) for layer in range(LAYERS) for expert in experts]


def test_a_steps_uses_are_told_in_the_order_of_the_layers() -> None:
    lookahead = PregatedLookahead(LAYERS, EXPERTS, Slots((0, 1)))
    lookahead.plan(one_head(2, 1), [])
    hints = list(lookahead.begin_step(5, [7]))
    assert [tuple(hint.expert) for hint in hints] == [(layer, e) for layer in range(LAYERS) for e in (1, 2)]
    assert [hint.needed_at for hint in hints] == [
        (5 * LAYERS + layer) * EXPERTS + e for layer in range(3) for e in (1, 2)
    ]
    assert lookahead.lacks


def test_each_layer_may_have_its_own_head() -> None:
    lookahead = PregatedLookahead(LAYERS, EXPERTS, Slots())
    lookahead.plan((frozenset({3}), frozenset({0, 2}), frozenset({1})), [])
    assert [tuple(hint.expert) for hint in lookahead.begin_step(1, [7])] == [(0, 3), (1, 0), (1, 2), (2, 1)]


def test_nothing_is_told_where_all_is_resident() -> None:
    lookahead = PregatedLookahead(LAYERS, EXPERTS, Slots(*everywhere(1, 2)))
    lookahead.plan(one_head(1), [(1, one_head(3))])
    assert not list(lookahead.begin_step(1, [7]))
    assert not lookahead.lacks
    assert lookahead.next_use(ExpertId(0, 3), 0) is None


def test_later_uses_say_who_had_better_stay_and_load_nothing() -> None:
    lookahead = PregatedLookahead(LAYERS, EXPERTS, Slots(*everywhere(0, 1)))
    lookahead.plan(one_head(1, 2), [(1, one_head(1)), (3, one_head(0, 3)), (4, one_head(1))])
    hints = {
        tuple(hint.expert): hint.needed_at for hint in lookahead.begin_step(10, [7]) if hint.expert.expert in (0, 3)
    }
    assert hints == {(layer, 0): (13 * LAYERS + layer) * EXPERTS for layer in range(LAYERS)}
    used = (10 * LAYERS + 2) * EXPERTS + 1
    assert lookahead.next_use(ExpertId(2, 1), used) == used + LAYERS * EXPERTS
    assert lookahead.next_use(ExpertId(2, 2), used) is None


def with_paths(sequence: EngineSequence, experts: Sequence[int]) -> EngineSequence:
    sequence.paths = Paths(PathShape(1, 1))
    sequence.paths.extend(Routes(array("q", experts), array("f", [1.0] * len(experts))), 0, len(experts))
    return sequence


def planned(*sequences: EngineSequence, max_step_tokens: int = 4) -> StepPlan:
    scheduler = make_scheduler(max_step_tokens=max_step_tokens)
    for sequence in sequences:
        scheduler.add(sequence)
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def test_what_waits_is_the_rest_of_a_cut_prompt_and_the_queue_behind_it() -> None:
    plan = planned(
        with_paths(make_sequence(1, range(6)), [0, 0, 1, 1, 2, 3]), with_paths(make_sequence(2, range(3)), [3, 3, 1])
    )
    assert step_union(plan) == one_head(0, 1)
    assert list(later_unions(plan, 4)) == [(1, one_head(1)), (2, one_head(2, 3)), (2, one_head(1, 3))]


def test_the_queue_is_told_by_steps_and_not_without_end() -> None:
    plan = planned(*(with_paths(make_sequence(i, range(4)), [i % 4] * 4) for i in range(9)))
    assert [ahead for ahead, _ in later_unions(plan, 4)] == [1, 2, 3, 4, 5]


def test_several_choices_a_token_are_taken_together() -> None:
    paths = Paths(PathShape(2, 2))
    paths.extend(Routes(array("q", [0, 1, 2, 3, 1, 4, 2, 5]), array("f", [0.5] * 8)), 0, 2)
    assert len(paths) == 2
    assert paths.union(0, 2) == (frozenset({0, 1, 4}), frozenset({2, 3, 5}))
    assert paths.union(1, 9) == (frozenset({1, 4}), frozenset({2, 5}))
