from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.governor import Governor, Record, Track
from expertd_engine.experts.lookahead import Exactness
from expertd_engine.experts.waste import MIN_PRECISION

LAYERS, EXPERTS = 2, 8
PERIOD = LAYERS * EXPERTS


class Predictor:
    """After layer 0 it names expert 1 and, of layer 1 too, expert 2."""

    exactness: Exactness = "predicted"

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        return ()

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        return [use(step, 1), use(step, 2)] if layer == 0 else ()

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return None


def use(step: int, expert: int) -> Hint:
    return Hint(ExpertId(1, expert), step * PERIOD + EXPERTS + expert)


class World:
    def __init__(self) -> None:
        self.resident: set[int] = set()
        self.governor = Governor(Predictor(), self.absent_for, LAYERS, EXPERTS, 4)
        self.step = 0

    def absent_for(self, expert: ExpertId) -> int | None:
        return None if expert.expert in self.resident else 100

    def token(self, *chosen: int) -> list[int]:
        """One token that chooses these of layer 1; the experts whose hints were let through."""
        self.step += 1
        assert not list(self.governor.begin_step(self.step, [0]))
        passed = [hint.expert.expert for hint in self.governor.routed(self.step, 0, [0])]
        assert not list(self.governor.routed(self.step, 1, sorted(chosen)))
        return passed


def test_nothing_is_followed_before_it_has_proved_itself_and_then_it_is() -> None:
    world = World()
    assert world.token(1, 2) == []
    for _ in range(20):
        world.token(1, 2)
    assert world.token(1, 2) == [1, 2]


def test_what_stops_coming_true_is_no_longer_followed() -> None:
    world = World()
    for _ in range(200):
        world.token(1, 2)
    for _ in range(400):
        world.token(5)
    assert world.token(5) == []


def test_a_class_that_is_right_half_of_the_time_is_not_followed() -> None:
    world = World()
    for turn in range(100):
        world.token(1 if turn % 2 else 5)
    assert world.token(1) == []


def test_hints_on_residents_pass_and_teach_nothing() -> None:
    world = World()
    world.resident = {2}
    for _ in range(30):
        assert world.token(5) == [2]
    assert sum(record.all for record in world.governor.records.values()) == pytest.approx(30 + 4)


def test_old_outcomes_fade() -> None:
    record = Record()
    for _ in range(10_000):
        record.add(True)
    for _ in range(1_500):
        record.add(False)
    assert record.precision < MIN_PRECISION and record.all <= 1024


class Sure:
    """After layer 0 it names expert 1 of layer 1 with trust 9, and expert 2 with trust 1."""

    exactness: Exactness = "predicted"

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        return ()

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        named = [(1, 9), (2, 1)] if layer == 0 else []
        return [Hint(ExpertId(1, e), step * PERIOD + EXPERTS + e, trust) for e, trust in named]

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return after + 1


class SureWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self.loading: set[int] = set()
        self.governor = Governor(
            Sure(), self.absent_for, LAYERS, EXPERTS, 4, lambda expert: expert.expert in self.loading
        )


def test_a_source_that_says_how_sure_it_is_is_believed_by_that() -> None:
    world = SureWorld()
    for turn in range(40):
        world.token(1, 2) if turn % 2 else world.token(1)
    assert world.token(1) == [1], "trust 9 came true each time, trust 1 every other time"


def test_what_came_of_hints_is_counted_by_layer_and_lead() -> None:
    world = SureWorld()
    for _ in range(40):
        world.token(1)
    track = world.governor.tracks[1, 1]
    assert (track.named, track.true) == (80, 40) and track.followed == track.followed_true == 40 - 20
    assert track.late == track.in_vain == 0
    world.loading = {1}
    world.token(1)
    assert track.late == 1, "it was needed before it had come"


def test_a_prefetch_that_nobody_used_is_counted_as_read_in_vain() -> None:
    world = SureWorld()
    for _ in range(40):
        world.token(1)
    world.step += 1
    assert [hint.expert.expert for hint in world.governor.routed(world.step, 0, [0])] == [1]
    world.resident = {1}  # it was read
    list(world.governor.routed(world.step, 1, [5]))
    assert world.governor.tracks[1, 1].in_vain == 1


def test_a_layer_and_lead_that_stops_paying_is_switched_off_and_comes_back() -> None:
    world = SureWorld()
    track = Track()
    world.governor.tracks[1, 1] = track
    for _ in range(40):
        world.token(1)
    for _ in range(31):
        track.approve(False)
    assert world.token(1) == [], "though its class is good: other layers carry that"
    for _ in range(200):
        world.token(1)
    assert not track.is_off and world.token(1) == [1], "it is judged all the same"


def test_where_reads_come_to_nothing_even_good_hints_are_not_followed() -> None:
    world = World()
    for _ in range(40):
        world.token(1, 2)
    assert world.token(1, 2) == [1, 2]
    spent = [0, 0]
    world.governor = Governor(
        Predictor(), world.absent_for, LAYERS, EXPERTS, 4, reads_ahead=lambda: (spent[0], spent[1])
    )
    for _ in range(40):
        world.token(1, 2)
    spent[:] = 100, 40
    assert world.token(1, 2) == [], "each came true, but two reads in five were given up or evicted again"
