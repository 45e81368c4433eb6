"""What the kernel says of memory that is short: PSI, and a cgroup's events. Reads files; decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertd_engine.errors import ConfigError
from expertd_engine.memory import MemoryCgroup, find_cgroup
from expertd_engine.planning.pressure import PressureReading

SYSTEM_PSI = Path("/proc/pressure/memory")


@dataclass(frozen=True, slots=True)
class PressureSource:
    """Where to look; None: there is no such thing here."""

    psi: Path | None
    """Lines such as `some avg10=0.00 avg60=0.00 avg300=0.00 total=1234`, the total in microseconds."""
    events: Path | None = None
    """`memory.events` of a cgroup of version 2, or `memory.failcnt` of version 1."""
    group: MemoryCgroup | None = None

    @property
    def name(self) -> str:
        """What is watched, for people; empty where nothing can be."""
        return ", ".join(str(path) for path in (self.psi, self.events) if path is not None)


def find_source(pid: int, system_psi: Path = SYSTEM_PSI) -> PressureSource:
    """The most specific files about the memory of a process: those of its cgroup, or else the system's."""
    group, system = find_cgroup(pid), _readable(system_psi)
    if group is None:
        return PressureSource(system)
    if group.version == 1:
        return PressureSource(system, _readable(group.folder / "memory.failcnt"), group)
    own = _readable(group.folder / "memory.pressure")
    return PressureSource(own or system, _readable(group.folder / "memory.events"), group)


def _readable(path: Path) -> Path | None:
    """PSI files exist where PSI is off, too, and then refuse to be read."""
    try:
        path.read_bytes()
    except OSError:
        return None
    return path


def open_pressure(pid: int) -> PressureReader:
    """A reader of what there is about the memory of a process. Raises ConfigError where there is nothing."""
    source = find_source(pid)
    if not source.name:
        raise ConfigError(
            "memory_pressure: on is not allowed here: neither /proc/pressure/memory nor a memory cgroup can be read"
        )
    return PressureReader(source, time.monotonic)


class PressureReader:
    """Turns the kernel's running totals into readings. Owner: the engine thread."""

    def __init__(self, source: PressureSource, clock: Callable[[], float]) -> None:
        self.source = source
        self._clock = clock
        self._stalled_s, self._crossings, self._at_s = self._totals()

    def read(self) -> PressureReading:
        """Of the time since the last call, or since the reader was made. Raises OSError if a file has gone."""
        stalled_s, crossings, now = self._totals()
        elapsed = max(now - self._at_s, 1e-9)
        share = min(1.0, (stalled_s - self._stalled_s) / elapsed)
        crossed = crossings - self._crossings
        self._stalled_s, self._crossings, self._at_s = stalled_s, crossings, now
        return PressureReading(now, share, crossed, self._room())

    def _totals(self) -> tuple[float, int, float]:
        stalled_s = _some_s(self.source.psi.read_text()) if self.source.psi else 0.0
        crossings = _crossings(self.source.events.read_text()) if self.source.events else 0
        return stalled_s, crossings, self._clock()

    def _room(self) -> int | None:
        group = self.source.group
        if group is None:
            return None
        line = _high_bytes(group) or group.limit_bytes()
        return None if line is None else line - group.used_bytes()


def _high_bytes(group: MemoryCgroup) -> int | None:
    """`memory.high`, where one is set."""
    file = group.folder / "memory.high"
    text = file.read_text().strip() if group.version == 2 else "max"
    return None if text == "max" else int(text)


def _some_s(text: str) -> float:
    """Seconds in which at least one task stood still."""
    some = next(line for line in text.splitlines() if line.startswith("some "))
    return int(some.rpartition("total=")[2]) / 1e6


def _crossings(text: str) -> int:
    """`high` and `max` of `memory.events`; `memory.failcnt` is a bare number."""
    if text.strip().isdigit():
        return int(text)
    events = dict(line.split() for line in text.splitlines())
    return int(events.get("high", 0)) + int(events.get("max", 0))
