"""Who computes what a card misses: both sides, or whoever goes through a record sooner, unless one is asked for or
cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_engine.config import DeviceMisses
from expertd_engine.errors import ConfigError
from expertd_engine.planning.misses import Misses, decide, left_to_processor, may_compute

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


@given(most=st.integers(1, 64), cpu=st.floats(1e9, 1e12), link=st.floats(1e9, 1e12))
def test_both_sides_together_are_done_the_soonest(most: int, cpu: float, link: float) -> None:
    split = left_to_processor(most, Misses("both", link, cpu))
    assert len(split) == most + 1 and split[:2] == [0, 0]
    for missing in range(2, most + 1):
        times = [max(left / cpu, (missing - left) / link) for left in range(missing)]
        assert times[split[missing]] == min(times), "one is read at least: it may stay"


def test_one_side_alone_has_all() -> None:
    assert left_to_processor(3, Misses("cpu", 1.0, 1.0)) == [0, 1, 2, 3]
    assert left_to_processor(3, Misses("link", 1.0, 1.0)) == [0, 0, 0, 0]


def test_what_stands_in_the_way_is_said() -> None:
    decided = decide("auto", "the kernels do not compute fp8", LINK)
    assert decided.where == "link" and "the kernels do not compute fp8" in (decided.fallback or "")
    assert decide("link", "the kernels do not compute fp8", LINK).fallback is None
    with pytest.raises(ConfigError, match=r"device_misses: 'cpu' .* do not compute fp8; give link"):
        may_compute("cpu", "the kernels do not compute fp8")
