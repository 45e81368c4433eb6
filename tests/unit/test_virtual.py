"""Virtual experts: the held sets, under any order of events, and how they follow the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expertd_engine.errors import EngineError, ResourceError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.held_ranks import HeldRanks
from expertd_engine.experts.swaps import Action, Hold, Release, Swap, SwapLimits
from expertd_engine.experts.virtual import VirtualExperts

LAYERS, EXPERTS, TOP_K = 2, 6, 2
PRIORS = [[float((7 * e + 3 * layer) % EXPERTS) for e in range(EXPERTS)] for layer in range(LAYERS)]

experts = st.builds(ExpertId, st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))


class VirtualMachine(RuleBasedStateMachine):
    """The twin knows scores by plain ageing, who is held, and who is on the way for whom."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = SwapLimits(half_life=2.0, hysteresis=0.5, per_step=1, in_flight=2)
        self.sets = VirtualExperts(PRIORS, TOP_K, self.limits)
        self.slots = [0] * LAYERS
        self.held: list[set[int]] = [set() for _ in range(LAYERS)]
        self.coming: set[ExpertId] = set()
        self.scores: dict[ExpertId, float] = {}

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            layer, expert = action.expert
            match action:
                case Hold():
                    assert expert not in self.held[layer] and action.expert not in self.coming
                    self.coming.add(action.expert)
                case Release():
                    self.held[layer].remove(expert)

    def score(self, layer: int, expert: int) -> float:
        return self.scores.get(ExpertId(layer, expert), 0.0)

    @rule(slots=st.tuples(*[st.integers(0, EXPERTS + 1)] * LAYERS), at_hand=st.sets(experts))
    def resize(self, slots: tuple[int, ...], at_hand: set[ExpertId]) -> None:
        if not all(TOP_K <= count <= EXPERTS for count in slots):
            with pytest.raises(ResourceError, match=rf"give {TOP_K}, which every token needs, to {EXPERTS}"):
                self.sets.resize(slots, at_hand)
            return
        lost = [sorted(self.score(layer, e) for e in held) for layer, held in enumerate(self.held)]
        before = [set(held) for held in self.held]
        swapping = self.coming_swaps()
        self.slots = list(slots)
        self.carry_out(self.sets.resize(slots, at_hand))
        for layer, (was, kept) in enumerate(zip(before, self.held, strict=True)):
            gone = [self.score(layer, e) for e in was - kept]
            if not swapping:  # then the lowest scores went
                assert sorted(gone) == pytest.approx(lost[layer][: len(gone)])

    @rule()
    def stop(self) -> None:
        self.slots = [0] * LAYERS
        self.carry_out(self.sets.stop())
        assert not any(self.held)

    @rule(expert=experts, value=st.floats(0.0, 100.0))
    def observe(self, expert: ExpertId, value: float) -> None:
        self.sets.observe(expert.layer, {expert.expert: value})
        self.scores[expert] = self.scores.get(expert, 0.0) + value

    @rule(expert=experts, value=st.floats(0.0, 100.0))
    def observe_from_outside(self, expert: ExpertId, value: float) -> None:
        self.sets.scores[expert.layer * self.sets.width + expert.expert] += value * self.sets.unit
        self.sets.observed([expert.layer])
        self.scores[expert] = self.scores.get(expert, 0.0) + value

    @rule(layer=st.integers(0, LAYERS - 1), expected=st.dictionaries(st.integers(0, EXPERTS - 1), st.floats(0.1, 9.0)))
    def foresee(self, layer: int, expected: dict[int, float]) -> None:
        before, loading = set(self.held[layer]), len(self.coming)
        actions = self.sets.foresee(layer, expected)
        self.carry_out(actions)
        assert self.held[layer] == before, "victims serve until the newcomers are there"
        assert len(actions) <= self.limits.ahead and len(self.coming) <= max(loading, self.limits.in_flight)
        assert all(isinstance(a, Hold) and a.expert.layer == layer and a.expert.expert in expected for a in actions)
        if len(before) == EXPERTS or before >= expected.keys():
            assert not actions

    @rule(tokens=st.sampled_from([1.0, 2.0, 300.0, 1e9]))
    def end_step(self, tokens: float) -> None:
        actions = self.sets.end_step(tokens)
        per_layer = [sum(a.expert.layer == layer and isinstance(a, Hold) for a in actions) for layer in range(LAYERS)]
        for layer, count in enumerate(per_layer):
            full = len(self.held[layer]) >= self.slots[layer]
            assert not full or count <= self.limits.per_step
            for action in actions:
                if full and isinstance(action, Hold) and action.expert.layer == layer:
                    worst = min(self.score(layer, e) for e in self.held[layer])
                    assert self.score(*action.expert) > worst * (1 + self.limits.hysteresis)
        self.carry_out(actions)
        self.scores = {expert: score * 2.0 ** (-tokens / 2.0) for expert, score in self.scores.items()}

    @precondition(lambda self: self.coming)
    @rule(data=st.data(), well=st.integers(0, 4))
    def end_load(self, data: st.DataObject, well: int) -> None:
        expert = data.draw(st.sampled_from(sorted(self.coming)))
        self.coming.remove(expert)
        if well:
            self.held[expert.layer].add(expert.expert)
            self.carry_out(self.sets.arrived(expert))
        else:
            self.scores.pop(expert, None)
            actions = self.sets.failed(expert)
            assert Hold(expert) not in actions, "what cannot be loaded is asked for again at once"
            self.carry_out(actions)

    @rule(expert=experts)
    def unasked_load(self, expert: ExpertId) -> None:
        if expert not in self.coming:
            with pytest.raises(EngineError, match="nobody asked for"):
                self.sets.arrived(expert)

    def coming_swaps(self) -> bool:
        """Whether any newcomer may be there for a victim, who cannot give way to a smaller set."""
        return bool(self.coming)

    @invariant()
    def sets_agree(self) -> None:
        assert [set(self.sets.held(layer)) for layer in range(LAYERS)] == self.held
        assert self.sets.is_settled == (not self.coming)
        assert self.sets.is_ready == all(len(held) >= TOP_K for held in self.held)

    @invariant()
    def scores_agree(self) -> None:
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                assert self.sets.score(layer, expert) == pytest.approx(self.score(layer, expert), rel=1e-6, abs=1e-9)

    @invariant()
    def no_more_than_slots(self) -> None:
        for layer, held in enumerate(self.held):
            coming = sum(expert.layer == layer for expert in self.coming)
            assert len(held) <= max(self.slots[layer], coming)

    @invariant()
    def nothing_is_lacking_for_a_token(self) -> None:
        for layer, held in enumerate(self.held):
            coming = sum(expert.layer == layer for expert in self.coming)
            failed = EXPERTS - len(held) - coming
            assert not self.slots[layer] or len(held) + coming >= TOP_K or failed


TestVirtualExperts = VirtualMachine.TestCase
TestVirtualExperts.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def settle(sets: VirtualExperts, actions: list[Action]) -> list[Action]:
    """Let every load end well, and what follows from it; all that was done, in order."""
    done = []
    while actions:
        done += actions
        actions = [after for action in actions if isinstance(action, Hold) for after in sets.arrived(action.expert)]
    return done


def test_slots_are_filled_from_what_is_at_hand_then_by_prior() -> None:
    sets = VirtualExperts([[0.1, 0.2, 0.9, 0.3, 0.8, 0.4]], 2, SwapLimits())
    settle(sets, sets.resize([4], [ExpertId(0, 0), ExpertId(0, 3)]))
    assert sets.held(0) == {0, 3, 2, 4}
    settle(sets, sets.resize([2]))
    assert sets.held(0) == {2, 4}, "of experts that nothing tells apart, the lowest priors go"


def test_loads_that_no_token_waits_for_come_a_few_at_a_time() -> None:
    sets = VirtualExperts([[float(e) for e in range(8)]] * 3, 2, SwapLimits(in_flight=1))
    first = sets.resize([6] * 3)
    assert len(first) == 6, "top-k for each of three layers, and no more"
    following = [sets.arrived(action.expert) for action in first]
    assert sum(map(len, following)) == 1


def topic(number: int, layer: int) -> dict[int, float]:
    """Each topic sends a token to four experts of its own, unevenly."""
    return {(4 * number + layer + i) % 16: 1.0 / (1 + i) for i in range(4)}


def shares_held(sets: VirtualExperts, number: int) -> float:
    """The gate mass of the topic's experts that is held, on average over layers."""
    layers = range(len(sets.slots))
    return sum(
        sum(v for e, v in topic(number, layer).items() if e in sets.held(layer)) / sum(topic(number, layer).values())
        for layer in layers
    ) / len(layers)


@pytest.mark.parametrize(("per_step", "in_flight", "within"), [(1, 8, 24), (2, 16, 20), (1, 1, 40)])
def test_the_sets_follow_a_new_topic_within_a_stated_number_of_tokens(
    per_step: int, in_flight: int, within: int
) -> None:
    layers = 4
    limits = SwapLimits(half_life=8, per_step=per_step, in_flight=in_flight)
    sets = VirtualExperts([[0.0] * 16] * layers, 2, limits)
    settle(sets, sets.resize([4] * layers))
    for number in (0, 2, 1, 3):
        for _ in range(within):
            for layer in range(layers):
                sets.observe(layer, topic(number, layer))
            settle(sets, sets.end_step(1))
        assert shares_held(sets, number) > 0.9
    assert sum(sets.swaps) > 0


def foreseeing(ahead: int = 2, in_flight: int = 9) -> VirtualExperts:
    """One layer of six experts that holds 0 to 3, of which 3 has the lowest score."""
    sets = VirtualExperts([[0.0] * EXPERTS], TOP_K, SwapLimits(ahead=ahead, in_flight=in_flight))
    sets.resize([4], [ExpertId(0, e) for e in range(4)])
    for expert in range(4):
        sets.arrived(ExpertId(0, expert))
    sets.observe(0, {0: 9.0, 1: 8.0, 2: 7.0, 3: 1.0})
    return sets


def test_what_is_foreseen_comes_for_what_nobody_expects_the_lowest_score_first() -> None:
    sets = foreseeing()
    assert sets.foresee(0, {3: 0.5, 4: 0.2, 5: 0.3}) == [Hold(ExpertId(0, 5)), Hold(ExpertId(0, 4))]
    assert sets.held(0) == {0, 1, 2, 3}, "until they are there"
    assert sets.arrived(ExpertId(0, 5)) == [Release(ExpertId(0, 2))]
    assert sets.arrived(ExpertId(0, 4)) == [Release(ExpertId(0, 1))]
    assert sets.foresee(0, {3: 0.5, 4: 0.2, 5: 0.3}) == []


def test_foresight_moves_no_more_than_it_may() -> None:
    expected = {4: 0.2, 5: 0.3}
    assert foreseeing(ahead=0).foresee(0, expected) == []
    assert foreseeing(ahead=1).foresee(0, expected) == [Hold(ExpertId(0, 5))]
    assert foreseeing(in_flight=1).foresee(0, expected) == [Hold(ExpertId(0, 5))]


def test_who_is_expected_as_much_is_not_swapped_out() -> None:
    everyone = dict.fromkeys(range(EXPERTS), 1.0)
    assert foreseeing().foresee(0, everyone) == []
    assert foreseeing().foresee(0, everyone | {5: 2.0}) == [Hold(ExpertId(0, 5))]


def bringing(foreseen: int = 2, held: int = 4) -> VirtualExperts:
    """As `foreseeing`, by what the step's tokens are."""
    sets = VirtualExperts([[0.0] * EXPERTS], TOP_K, SwapLimits(foreseen=foreseen, in_flight=9))
    sets.resize([held], [ExpertId(0, e) for e in range(held)])
    for expert in range(held):
        sets.arrived(ExpertId(0, expert))
    sets.observe(0, {0: 9.0, 1: 8.0, 2: 7.0, 3: 1.0})
    return sets


def mine(expert: int) -> ExpertId:
    return ExpertId(0, expert)


WANTED = [mine(5), mine(4)]
SHARES = [[0.0, 0.0, 0.0, 0.1, 0.4, 0.5]].__getitem__


def test_what_a_step_will_ask_for_takes_the_place_of_what_is_worth_least() -> None:
    sets = bringing()
    assert sets.bring(WANTED, SHARES) == [Swap(*map(mine, pair)) for pair in ((5, 3), (4, 2))]
    assert sets.held(0) == {0, 1}, "its room is the newcomer's"
    assert sets.arrived(ExpertId(0, 5)) == [] and sets.swaps == [1]
    assert sets.bring(WANTED, SHARES) == [], "one is there, one on its way"
    assert [action.expert.expert for action in sets.failed(ExpertId(0, 4))] == [2], "the place is filled again"


def test_a_step_brings_in_no_more_than_it_may_and_leaves_a_token_enough() -> None:
    assert len(bringing(foreseen=1).bring(WANTED, SHARES)) == 1
    assert bringing(held=TOP_K).bring(WANTED, SHARES) == []
    assert bringing().bring([ExpertId(0, 5)], lambda layer: [0.3, 0.3, 0.3, 0.09, 0.0, 0.01]) == []


def test_equal_experts_are_not_swapped_back_and_forth() -> None:
    sets = VirtualExperts([[0.0] * 8], 2, SwapLimits(half_life=16, hysteresis=0.25))
    settle(sets, sets.resize([4]))
    for token in range(400):
        sets.observe(0, {token % 8: 1.0, (token + 3) % 8: 1.0})
        settle(sets, sets.end_step(1))
    assert sum(sets.swaps) < 40, "round robin: every expert is worth the same"


@given(st.data())
def test_layers_sought_at_once_choose_as_each_would_alone(data: st.DataObject) -> None:
    """Sums are whole numbers: the two ways to add them round alike."""
    experts = [6, 4, 6, 5, 6, 4, 6]
    priors = [[float((7 * e + 3 * layer) % 11) for e in range(count)] for layer, count in enumerate(experts)]
    limits = SwapLimits(half_life=8.0, per_step=1, in_flight=data.draw(st.integers(1, 9)), ahead=0)
    together, alone = (VirtualExperts(priors, 2, limits) for _ in range(2))
    ranks = HeldRanks(together)
    slots = [data.draw(st.integers(2, count)) for count in experts]
    waiting = [action.expert for action in together.resize(slots)]
    assert [action.expert for action in alone.resize(slots)] == waiting
    for _ in range(data.draw(st.integers(1, 8))):
        sums = np.zeros((len(experts), max(experts)), np.float32)
        for layer, count in enumerate(experts):
            sums[layer, :count] = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
            alone.observe(layer, {e: value for e, value in enumerate(sums[layer].tolist()) if value})
        ranks.observe(sums)
        ranks.seek()
        actions = together.end_step(8.0)
        assert alone.end_step(8.0) == actions
        waiting += [action.expert for action in actions if isinstance(action, Hold)]
        while waiting:
            if not data.draw(st.booleans()):
                break
            newcomer = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            ends = data.draw(st.sampled_from(["arrived", "arrived", "failed"]))
            further = [getattr(sets, ends)(newcomer) for sets in (together, alone)]
            assert further[0] == further[1]
            waiting += [action.expert for action in further[0] if isinstance(action, Hold)]
    assert together.swaps == alone.swaps


def test_no_swap_where_none_is_allowed() -> None:
    sets = VirtualExperts([[0.0] * 8], 2, SwapLimits(per_step=0))
    settle(sets, sets.resize([3]))
    held = sets.held(0)
    for _ in range(50):
        sets.observe(0, {7: 10.0})
        assert sets.end_step(1) == []
    assert sets.held(0) == held


def test_an_hour_of_tokens_leaves_scores_finite() -> None:
    sets = VirtualExperts([[0.0] * 4], 1, SwapLimits(half_life=1.0))
    settle(sets, sets.resize([2]))
    for token in range(5000):
        sets.observe(0, {token % 4: 1.0})
        settle(sets, sets.end_step(1))
    assert [sets.score(0, e) for e in range(4)] == pytest.approx([1 / 15 * 2**i for i in range(4)], rel=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"half_life": 0.0}, {"hysteresis": -0.1}, {"per_step": -1}, {"in_flight": 0}], ids=str
)
def test_limits_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        SwapLimits(**wrong)  # type: ignore[arg-type]  # the names are the cases
