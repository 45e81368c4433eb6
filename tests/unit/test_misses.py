"""Who computes what a card misses: whoever goes through a record sooner, unless one is asked for or cannot."""

from __future__ import annotations

import pytest

from expertd_engine.config import DeviceMisses
from expertd_engine.errors import ConfigError
from expertd_engine.planning.misses import decide, may_compute

LINK = 50e9


@pytest.mark.parametrize(("cpu", "where"), [(60e9, "cpu"), (40e9, "link"), (LINK, "link")])
def test_the_faster_is_taken(cpu: float, where: str) -> None:
    decided = decide("auto", None, LINK, cpu)
    assert (decided.where, decided.link_bytes_per_s, decided.cpu_bytes_per_s) == (where, LINK, cpu)
    assert decided.fallback is None


@pytest.mark.parametrize(("asked", "cpu"), [("cpu", 1e9), ("link", 100e9)])
def test_what_is_asked_for_is_done_however_slow(asked: DeviceMisses, cpu: float) -> None:
    assert decide(asked, None, LINK, cpu).where == asked


def test_who_cannot_compute_is_not_measured() -> None:
    assert may_compute("cpu", None) and may_compute("auto", None) and not may_compute("link", None)
    assert not may_compute("auto", "no kernels") and not may_compute("link", "no kernels")


def test_what_stands_in_the_way_is_said() -> None:
    decided = decide("auto", "the kernels do not compute fp8", LINK)
    assert decided.where == "link" and "the kernels do not compute fp8" in (decided.fallback or "")
    assert decide("link", "the kernels do not compute fp8", LINK).fallback is None
    with pytest.raises(ConfigError, match=r"device_misses: 'cpu' .* do not compute fp8; give link"):
        may_compute("cpu", "the kernels do not compute fp8")
