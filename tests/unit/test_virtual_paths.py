"""Held paths: layers follow one choice, swaps are whole, and tokens take the likeliest path that is there."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_engine.errors import ResourceError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.swaps import Action, Hold, SwapLimits
from expertd_engine.experts.virtual_paths import VirtualPaths, serve

LAYERS, PATHS = 3, 4


class Box:
    """Carries actions out, and ends loads when told."""

    def __init__(self, in_flight: int = 2, prior: tuple[float, ...] = (4.0, 3.0, 2.0, 1.0)) -> None:
        self.sets = VirtualPaths(prior, LAYERS, SwapLimits(in_flight=in_flight, half_life=4))
        self.loading: list[ExpertId] = []
        self.held: set[ExpertId] = set()

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Hold):
                assert action.expert not in self.held and action.expert not in self.loading
                self.loading.append(action.expert)
            else:
                self.held.remove(action.expert)
        assert self.held == {ExpertId(layer, e) for layer in range(LAYERS) for e in self.sets.held(layer)}
        assert self.sets.is_settled == (not self.loading)
        assert self.sets.whole() == frozenset.intersection(*(self.sets.held(layer) for layer in range(LAYERS)))

    def end(self, number: int = 0, *, well: bool = True) -> None:
        expert = self.loading.pop(number)
        if well:
            self.held.add(expert)
        self.do(self.sets.arrived(expert) if well else self.sets.failed(expert))

    def settle(self) -> None:
        while self.loading:
            self.end()

    def step(self, path: int, sure: float = 1.0) -> None:
        self.sets.observe_paths({path: sure})
        self.do(self.sets.end_step(1.0))


def test_layers_hold_the_same_paths_the_best_first() -> None:
    box = Box()
    box.do(box.sets.resize([2] * LAYERS))
    assert box.loading == [(0, 0), (1, 0)], "one path at a time, two loads at once"
    assert not box.sets.whole()
    box.settle()
    assert box.sets.whole() == {0, 1} and box.sets.slots == [2] * LAYERS
    with pytest.raises(ResourceError, match="0 virtual slots for MoE layer 0 are not allowed: give 1"):
        box.sets.resize([0] * LAYERS)


def test_what_is_whole_at_hand_is_held_before_what_ranks_higher() -> None:
    box = Box(in_flight=9)
    near = [ExpertId(layer, path) for layer in range(LAYERS) for path in (2, 3)] + [ExpertId(0, 0), ExpertId(1, 0)]
    box.do(box.sets.resize([2] * LAYERS, near))
    assert sorted(box.loading) == [(layer, path) for layer in range(LAYERS) for path in (2, 3)]


def test_a_swap_goes_through_the_layers_and_is_done_before_the_next() -> None:
    box = Box(in_flight=1)
    box.do(box.sets.resize([2] * LAYERS))
    box.settle()
    box.step(3)
    assert box.loading == [(0, 3)]
    box.step(2, sure=9.0)
    box.end()
    assert [box.sets.held(layer) for layer in range(LAYERS)] == [{0, 3}, {0, 1}, {0, 1}], (
        "it leaves where it is replaced"
    )
    assert box.loading == [(1, 3)] and box.sets.whole() == {0}
    box.settle()
    assert box.sets.whole() == {0, 3} and box.sets.swaps == [1] * LAYERS
    box.step(2)
    box.settle()
    assert box.sets.whole() == {2, 3} and box.sets.swaps == [2] * LAYERS


def test_who_serves_a_step_stays_until_it_ends() -> None:
    box = Box(in_flight=3)
    box.do(box.sets.resize([1] * LAYERS))
    box.settle()
    box.step(3)
    box.sets.stay = True
    box.settle()
    assert box.sets.whole() == {0, 3}
    box.sets.stay = False
    box.do(box.sets.end_step(1.0))
    assert box.sets.whole() == {3} and box.sets.held(1) == {3}


def test_a_path_that_cannot_be_read_gives_way_and_those_it_replaced_come_back() -> None:
    box = Box(in_flight=1)
    box.do(box.sets.resize([1] * LAYERS))
    box.settle()
    box.step(3)
    box.end()
    box.end(well=False)
    box.settle()
    assert box.sets.whole() == {0} and not [expert for expert in box.held if expert.expert == 3]
    box.do(box.sets.end_step(1.0))
    assert not box.loading, "it is not asked for again before it is wanted again"
    box.step(3)
    box.settle()
    assert box.sets.whole() == {3}


EVENTS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, PATHS - 1)),
    st.tuples(st.just("end"), st.integers(0, 7)),
    st.tuples(st.just("fail"), st.integers(0, 7)),
    st.tuples(st.just("resize"), st.integers(1, PATHS)),
    st.tuples(st.just("stop"), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.lists(EVENTS, max_size=60))
def test_whatever_happens_layers_end_with_the_same_paths(in_flight: int, events: list[tuple[str, int]]) -> None:
    box = Box(in_flight)
    slots = 2
    box.do(box.sets.resize([slots] * LAYERS))
    for event, value in events:
        before = len(box.loading)
        if event == "step":
            box.step(value)
        elif event == "resize":
            slots = value
            box.do(box.sets.resize([slots] * LAYERS))
            assert all(len(box.sets.held(layer)) <= slots for layer in range(LAYERS)), "what is too much goes at once"
        elif event == "stop":
            slots = 0
            box.do(box.sets.stop())
            assert not box.held
        elif before:
            box.end(value % before, well=event == "end")
        assert len(box.loading) <= max(in_flight, before)
        assert all(len(box.sets.held(layer)) <= max(slots, 1) + in_flight for layer in range(LAYERS))
    for path in range(PATHS):
        box.sets.observe_paths({path: 1e-9})  # what failed may be asked for again
    for _ in range(2 * PATHS):
        box.do(box.sets.end_step(1.0))
        box.settle()
    assert [box.sets.held(layer) for layer in range(LAYERS)] == [box.sets.whole()] * LAYERS
    assert len(box.sets.whole()) == slots


chances = st.lists(st.floats(0.001, 1), min_size=PATHS, max_size=PATHS).map(lambda c: [x / sum(c) for x in c])
subsets = st.sets(st.integers(0, PATHS - 1), min_size=1)


@given(chances, st.lists(subsets, min_size=LAYERS, max_size=LAYERS), st.floats(0, 1))
def test_a_token_is_served_by_what_is_there_or_by_its_own(
    given_chances: list[float], held: list[set[int]], limit: float
) -> None:
    whole = set.intersection(*held)
    own = max(range(PATHS), key=lambda path: given_chances[path])
    if own in whole:
        return
    free = serve(given_chances, own, whole, held, 1.0)
    assert free is not None
    assert all(free.in_layer(layer) in held[layer] for layer in range(LAYERS))
    if whole:
        assert free.paths == (max(whole, key=lambda path: (given_chances[path], -path)),)
    for layer in range(LAYERS):
        path, mass = free.in_layer(layer), free.masses[layer % len(free.masses)]
        assert mass >= (given_chances[own] if path != own and given_chances[path] < given_chances[own] else 0)
        assert mass <= 1 - given_chances[path] + 1e-9
    bound = serve(given_chances, own, whole, held, limit)
    assert bound == (free if limit >= 1 or max(free.masses) <= limit + 1e-6 else None)


def test_where_no_path_is_whole_the_one_that_most_layers_hold_serves() -> None:
    served = serve([0.1, 0.2, 0.6, 0.1], 2, (), [{0, 2}, {0}, {1, 3}], 1.0)
    assert served is not None and served.paths == (0, 0, 1)
    assert served.masses == pytest.approx((0.8, 0.8, 0.6))
