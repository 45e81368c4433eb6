"""Who computes what a card misses: both sides, or whoever goes through a record sooner, unless one is asked for or
cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_engine.config import DeviceMisses
from expertd_engine.errors import ConfigError
from expertd_engine.planning.misses import (
    CUT_NEURONS,
    LEAST_GAIN,
    Misses,
    Split,
    decide,
    left_to_processor,
    may_compute,
    seconds,
)

LINK = 50e9


@pytest.mark.parametrize(("cpu", "where"), [(60e9, "both"), (13e9, "both"), (12e9, "link"), (210e9, "cpu")])
def test_both_are_taken_unless_one_is_much_faster(cpu: float, where: str) -> None:
    decided = decide("auto", None, LINK, cpu)
    assert (decided.where, decided.link_bytes_per_s, decided.cpu_bytes_per_s) == (where, LINK, cpu)
    assert decided.fallback is None


@pytest.mark.parametrize(("asked", "cpu"), [("cpu", 1e9), ("link", 100e9), ("both", 1e9)])
def test_what_is_asked_for_is_done_however_slow(asked: DeviceMisses, cpu: float) -> None:
    assert decide(asked, None, LINK, cpu).where == asked


def test_who_cannot_compute_is_not_measured() -> None:
    assert may_compute("cpu", None) and may_compute("auto", None) and not may_compute("link", None)
    assert not may_compute("auto", "no kernels") and not may_compute("link", "no kernels")


RECORD = 5_000_000
SPEEDS = st.floats(1e9, 1e12)


@given(
    most=st.integers(1, 12), cpu=SPEEDS, link=SPEEDS, start=st.floats(0, 1e-3),
    inner=st.sampled_from([33, 64, 100, 768, 1408]),
)  # fmt: skip
def test_both_sides_together_are_done_the_soonest(most: int, cpu: float, link: float, start: float, inner: int) -> None:
    decided = Misses("both", link, cpu, start)
    splits = [left_to_processor(missing, decided, RECORD, inner) for missing in range(most + 1)]
    assert splits[0] == (0, 0)
    before = 0.0
    for missing, split in enumerate(splits[1:], 1):
        cuts = range(CUT_NEURONS, inner, CUT_NEURONS)
        allowed = [Split(whole, cut) for whole in range(missing) for cut in (0, *cuts)]
        assert split in allowed, "at least a part is read: a whole one may stay"
        times = {one: seconds(missing, one, decided, RECORD, inner) for one in allowed}
        soonest, undivided = min(times.values()), min(took for one, took in times.items() if not one.cut)
        assert times[split] == pytest.approx(soonest if split.cut else undivided)
        gain = (undivided - soonest) / (LEAST_GAIN * RECORD / link)
        assert gain >= 1 - 1e-6 if split.cut else gain <= 1 + 1e-6
        left = split.whole + (1 - split.cut / inner if split.cut else 0)
        assert left >= before, "the more are missing, the more the processor takes"
        before = left


def test_one_that_is_missing_is_divided() -> None:
    equal = [left_to_processor(missing, Misses("both", LINK, LINK), RECORD, 768) for missing in range(3)]
    assert equal == [(0, 0), (0, 384), (1, 0)]
    assert left_to_processor(1, Misses("both", LINK, LINK, cpu_start_s=20e-6), RECORD, 768) == (0, 448)
    assert left_to_processor(1, Misses("both", LINK, LINK, cpu_start_s=90e-6), RECORD, 768) == (0, 0)


def test_one_side_alone_has_all() -> None:
    assert left_to_processor(3, Misses("cpu", 1.0, 1.0), 1, 768) == (3, 0)
    assert left_to_processor(3, Misses("link", 1.0, 1.0), 1, 768) == (0, 0)


def test_what_stands_in_the_way_is_said() -> None:
    decided = decide("auto", "the kernels do not compute fp8", LINK)
    assert decided.where == "link" and "the kernels do not compute fp8" in (decided.fallback or "")
    assert decide("link", "the kernels do not compute fp8", LINK).fallback is None
    with pytest.raises(ConfigError, match=r"device_misses: 'cpu' .* do not compute fp8; give link"):
        may_compute("cpu", "the kernels do not compute fp8")
