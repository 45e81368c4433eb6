"""The room that virtual mode may take of an expert budget."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_engine.experts.virtual_room import VirtualRoom

ROOM = VirtualRoom([100, 100, 200], [16, 16, 8], top_k=2, share=0.75, wanted=[16, 16, 8])
ALL = 16 * 100 + 16 * 100 + 8 * 200
FLOOR = 2 * 400


@settings(max_examples=200, deadline=None)
@given(st.integers(0, ALL + 500), st.floats(0.01, 1.0))
def test_slots_fit_and_leave_two_records_to_load_through(budget: int, share: float) -> None:
    room = replace(ROOM, share=share)
    slots = room.slots(budget)
    if budget >= ALL:
        assert slots == [16, 16, 8]
    elif budget < FLOOR + 400:
        assert slots is None and room.minimum_bytes == FLOOR + 400
    else:
        assert slots is not None and min(slots) >= 2
        taken = sum(count * size for count, size in zip(slots, room.record_bytes, strict=True))
        assert taken <= max(FLOOR, min(share * budget, budget - 400))


def test_a_plan_decides_where_there_is_one() -> None:
    asked: list[int] = []

    def divide(nbytes: int) -> list[int]:
        asked.append(nbytes)
        return [3, 2, 2]

    assert replace(ROOM, divide=divide).slots(2000) == [3, 2, 2] and asked == [1500]
    assert replace(ROOM, divide=divide).slots(FLOOR + 400) == [3, 2, 2] and asked[-1] >= FLOOR


def test_slots_that_were_asked_for_are_given_where_they_fit() -> None:
    asked = replace(ROOM, wanted=[4, 4, 4])
    assert asked.slots(ALL) == asked.slots(3000) == [4, 4, 4]
    assert asked.slots(FLOOR + 400) == [2, 2, 2]
