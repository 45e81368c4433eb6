"""Memory pressure: who is short is lent to at once, what is lent comes back slowly, and files are read as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_engine import pressure
from expertd_engine.errors import ConfigError
from expertd_engine.memory import MemoryCgroup
from expertd_engine.planning.pressure import CALM_S, LONGEST_CALM_S, PressureControl, PressureReading
from expertd_engine.pressure import PressureReader, PressureSource, find_source, open_pressure

SHORT, BETWEEN, CALM = (PressureReading(0.0, stalled) for stalled in (0.5, 0.05, 0.0))
PLANNED, MINIMUM = 1600, 100


class Box:
    """A control, a second between readings, and experts that fill what they may have."""

    def __init__(self) -> None:
        self.control = PressureControl()
        self.now = 0.0
        self.bytes = PLANNED

    def tell(self, reading: PressureReading, seconds: int = 1) -> int:
        for _ in range(seconds):
            self.now += 1
            self.bytes = self.control.ceiling(replace(reading, at_s=self.now), PLANNED, MINIMUM, self.bytes)
        return self.bytes

    def seconds_to_grow(self, reading: PressureReading = CALM) -> int:
        before = self.bytes
        return next(n for n in range(1, 1000) if self.tell(reading) > before)


def test_without_pressure_nothing_is_lent() -> None:
    box = Box()
    assert box.tell(CALM, 100) == PLANNED == box.tell(BETWEEN, 100)
    assert box.control.shrinks == 0


@pytest.mark.parametrize("reading", [SHORT, PressureReading(0.0, 0.0, 1, 0)], ids=["stalls", "memory.high"])
def test_a_short_box_is_lent_a_quarter_each_second_down_to_the_least(reading: PressureReading) -> None:
    box = Box()
    assert [box.tell(reading) for _ in range(2)] == [1200, 900]
    assert box.tell(reading, 20) == MINIMUM
    assert box.control.lent_bytes == PLANNED - MINIMUM


def test_a_line_that_page_cache_meets_is_nobodys_trouble() -> None:
    assert Box().tell(PressureReading(0.0, 0.0, crossings=9, room=PLANNED // 8)) == PLANNED


def test_experts_that_are_not_there_cannot_be_lent() -> None:
    control = PressureControl()
    assert control.ceiling(SHORT, PLANNED, MINIMUM, 400) == 300


def test_between_the_thresholds_nothing_moves_and_calm_begins_anew() -> None:
    box = Box()
    lent = box.tell(SHORT)
    assert box.tell(BETWEEN, 100) == lent
    assert box.tell(CALM, int(CALM_S)) == lent
    assert box.tell(BETWEEN) == lent == box.tell(CALM, int(CALM_S))
    assert box.tell(CALM) == lent + PLANNED // 16


def test_calm_gives_everything_back_in_the_end() -> None:
    box = Box()
    box.tell(SHORT, 3)
    assert box.tell(CALM, 60) == PLANNED
    assert box.control.lent_bytes == 0


def test_taking_back_too_early_is_paid_for_with_longer_calm() -> None:
    box, waits = Box(), []
    for _ in range(8):
        box.tell(SHORT)
        waits.append(box.seconds_to_grow())
    assert waits == sorted(waits)
    assert waits[0] <= CALM_S + 1 and waits[1] >= 2 * CALM_S and waits[-1] <= LONGEST_CALM_S + 1


def test_nothing_is_taken_back_below_a_line_that_would_be_met_again() -> None:
    box = Box()
    box.tell(SHORT)
    step = PLANNED // 16
    assert box.tell(PressureReading(0.0, 0.0, 0, 2 * step - 1), 100) == 1200
    assert box.tell(PressureReading(0.0, 0.0, 0, 2 * step), int(CALM_S) + 1) == 1200 + step


@given(st.lists(st.tuples(st.sampled_from([SHORT, BETWEEN, CALM]), st.integers(0, PLANNED), st.integers(50, 3000))))
def test_the_ceiling_stays_between_the_least_and_the_plan(told: list[tuple[PressureReading, int, int]]) -> None:
    control = PressureControl()
    for second, (reading, resident, planned) in enumerate(told):
        ceiling = control.ceiling(replace(reading, at_s=second), planned, 50, resident)
        assert 50 <= ceiling <= planned and ceiling == planned - control.lent_bytes


# ---------------------------------------------------------------- files


def psi(path: Path, total_us: int) -> Path:
    path.write_text(
        f"some avg10=1.00 avg60=0.03 avg300=0.00 total={total_us}\n"
        f"full avg10=0.00 avg60=0.00 avg300=0.00 total={total_us // 2}\n"
    )
    return path


def group_of(folder: Path, version: int) -> MemoryCgroup:
    folder.mkdir(exist_ok=True)
    (folder / "memory.events").write_text("low 9\nhigh 2\nmax 1\noom 0\noom_kill 0\n")
    (folder / "memory.high").write_text("5000\n")
    (folder / "memory.current").write_text("4000\n")
    (folder / "memory.failcnt").write_text("7\n")
    (folder / "memory.limit_in_bytes").write_text("6000\n")
    (folder / "memory.usage_in_bytes").write_text("4000\n")
    names = ("file_mapped 0", "mapped_file 0", "inactive_file 300", "active_file 200")
    (folder / "memory.stat").write_text("".join(f"{name}\ntotal_{name}\n" for name in names))
    psi(folder / "memory.pressure", 0)
    return MemoryCgroup(folder, version)


def test_totals_become_shares_of_the_time_between_readings(tmp_path: Path) -> None:
    times = iter([100.0, 102.0, 103.0, 103.0])
    file = psi(tmp_path / "memory", 5_000_000)
    reader = PressureReader(PressureSource(file), lambda: next(times))
    psi(file, 5_500_000)
    assert reader.read() == PressureReading(102.0, 0.25)
    psi(file, 9_000_000)
    assert reader.read() == PressureReading(103.0, 1.0), "several processors' stalls can overtake the clock"
    assert reader.read() == PressureReading(103.0, 0.0)


def test_a_cgroup_of_version_2_has_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(tmp_path / "group", 2)
    monkeypatch.setattr(pressure, "find_cgroup", lambda pid: group)
    source = find_source(1, psi(tmp_path / "system", 0))
    assert source.psi == group.folder / "memory.pressure"
    times = iter([0.0, 1.0, 2.0])
    reader = PressureReader(source, lambda: next(times))
    (group.folder / "memory.events").write_text("low 9\nhigh 5\nmax 2\noom 0\noom_kill 0\n")
    assert reader.read() == PressureReading(1.0, 0.0, crossings=4, room=1500)
    (group.folder / "memory.high").write_text("max\n")
    (group.folder / "memory.max").write_text("max\n")
    assert reader.read() == PressureReading(2.0, 0.0, crossings=0, room=None)


def test_a_cgroup_of_version_1_counts_failures_and_the_system_tells_stalls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of(tmp_path / "group", 1)
    monkeypatch.setattr(pressure, "find_cgroup", lambda pid: group)
    system = psi(tmp_path / "system", 0)
    source = find_source(1, system)
    assert source.psi == system
    times = iter([0.0, 1.0])
    reader = PressureReader(source, lambda: next(times))
    (group.folder / "memory.failcnt").write_text("9\n")
    assert reader.read() == PressureReading(1.0, 0.0, crossings=2, room=2500)


def test_where_nothing_can_be_watched_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "find_cgroup", lambda pid: None)
    assert find_source(1, tmp_path / "nowhere").name == ""
    monkeypatch.setattr(pressure, "find_source", lambda pid: PressureSource(None))
    with pytest.raises(ConfigError, match="memory_pressure: on is not allowed here"):
        open_pressure(1)
