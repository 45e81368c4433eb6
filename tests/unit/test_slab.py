"""The slab: bytes stay where they are put, and dropping a slot returns its memory, as the kernel sees it."""

from __future__ import annotations

import pytest

from expertd_engine.experts.slab import HUGE_PAGE, PAGE, Slab
from expertd_engine.memory import rss_bytes

SLOT = 256 * PAGE


def fill(slab: Slab, slot: int, byte: int) -> None:
    slab.view(slot, slab.slot_bytes)[:] = bytes([byte]) * slab.slot_bytes


def test_slots_do_not_overlap_and_begin_at_pages() -> None:
    slab = Slab(3, 2 * PAGE)
    for slot in range(3):
        fill(slab, slot, slot + 1)
    assert [set(slab.view(slot, 2 * PAGE)) for slot in range(3)] == [{1}, {2}, {3}]
    assert bytes(slab.whole[2 * PAGE : 2 * PAGE + 4]) == b"\2\2\2\2"
    assert slab.address % PAGE == 0 and len(slab.whole) == 6 * PAGE


def test_a_view_is_as_long_as_asked() -> None:
    assert len(Slab(2, 2 * PAGE).view(1, PAGE + 7)) == PAGE + 7


def test_memory_is_committed_by_writing_and_returned_by_dropping() -> None:
    slab = Slab(64, SLOT)
    before = rss_bytes()
    for slot in range(64):
        fill(slab, slot, 7)
    written = rss_bytes()
    assert written - before > 60 * SLOT
    for slot in range(0, 64, 2):
        slab.drop(slot)
    assert 28 * SLOT < written - rss_bytes() < 36 * SLOT
    assert set(slab.view(0, SLOT)) == {0} and set(slab.view(1, SLOT)) == {7}


def test_a_kept_head_keeps_its_bytes_and_the_rest_is_returned() -> None:
    slab = Slab(2, 4 * PAGE)
    fill(slab, 0, 5)
    fill(slab, 1, 6)
    slab.drop(0, keep_bytes=PAGE)
    assert set(slab.view(0, PAGE)) == {5} and set(slab.view(0, 4 * PAGE)[PAGE:]) == {0}
    slab.drop(1, keep_bytes=4 * PAGE)
    assert set(slab.view(1, 4 * PAGE)) == {6}


@pytest.mark.parametrize("whole", [HUGE_PAGE, 2 * HUGE_PAGE + PAGE])
def test_huge_pages_lie_inside_records_and_are_returned_whole(whole: int) -> None:
    size = 3 * HUGE_PAGE + 5 * PAGE
    slab = Slab(6, size, whole_bytes=whole)
    assert slab.address % HUGE_PAGE == 0 and slab.stride % HUGE_PAGE == 0 and slab.slot_bytes == size
    patterns = [bytes([slot + 1]) * whole for slot in range(6)]
    before = rss_bytes()
    for slot, pattern in enumerate(patterns):
        slab.view(slot, whole)[:] = pattern
    written = rss_bytes() - before
    assert abs(written - 6 * whole) < HUGE_PAGE
    for slot in (0, 2, 3, 5):
        slab.drop(slot)
    assert abs(rss_bytes() - before - 2 * whole) < HUGE_PAGE
    assert slab.view(0, whole) == bytes(whole) and [slab.view(s, whole) == patterns[s] for s in (1, 4)] == [True, True]


def test_more_than_the_box_has_can_be_reserved() -> None:
    slab = Slab(2**20, 2**20)  # 1 TiB
    fill_end = slab.view(2**20 - 1, PAGE)
    fill_end[:4] = b"last"
    assert bytes(slab.view(2**20 - 1, 4)) == b"last"


@pytest.mark.parametrize(("slots", "size"), [(0, PAGE), (1, 0), (1, PAGE + 1), (1, PAGE // 2)])
def test_impossible_shapes_are_refused(slots: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"{slots} slots of {size} bytes"):
        Slab(slots, size)
