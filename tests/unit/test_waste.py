from __future__ import annotations

from expertd_engine.experts.waste import MIN_PRECISION, WasteLimit


def spend(limit: WasteLimit, steps: int, reads: int, wasted: int, start: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Steps with so many reads each, some wasted; the sums since the start."""
    total, lost = start
    for _ in range(steps):
        total, lost = total + reads, lost + wasted
        limit.tell(1, total, lost)
    return total, lost


def test_little_waste_asks_no_more_of_a_hint_than_ever() -> None:
    limit = WasteLimit()
    spend(limit, 100, 20, 2)
    assert limit.least_precision == MIN_PRECISION


def test_a_fifth_wasted_leaves_only_the_surest_and_a_good_fifth_none() -> None:
    limit = WasteLimit()
    spend(limit, 100, 20, 4)
    assert 0.9 < limit.least_precision < 1
    spend(limit, 100, 20, 5, (2000, 400))
    assert limit.least_precision > 1


def test_the_first_reads_settle_nothing() -> None:
    limit = WasteLimit()
    limit.tell(1, 1, 1)
    assert limit.least_precision == MIN_PRECISION


def test_what_was_stopped_is_tried_again() -> None:
    limit = WasteLimit()
    told = spend(limit, 50, 4, 2)
    assert limit.least_precision > 1
    limit.tell(2048, *told)
    assert limit.least_precision < 0.9


def test_old_waste_is_forgiven_soonest_where_much_is_read() -> None:
    limit = WasteLimit()
    told = spend(limit, 30, 20, 10)
    spend(limit, 60, 20, 1, told)
    assert limit.least_precision == MIN_PRECISION
