"""Carries records from the host's memory into a device's slots, a few at a time, on the lane for copies.

Owner: the engine thread, which submits and asks; there are no threads here. What has not begun can be taken back; what
has begun ends. Only so much is begun ahead that the lane does not run dry until somebody asks again: what a kernel
reads over the same link comes between records.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

from expertd_engine.experts.device_streams import Device, Mark
from expertd_engine.experts.device_table import DeviceTable
from expertd_engine.experts.events import Cancelled, Load, Loaded, Priority
from expertd_engine.experts.transfer import LATENCY_BOUNDS_S, TransferStats

_AHEAD_BYTES = 16 * 2**20
_MEASURED_BYTES, _MEASURED_MOST = 64 * 2**20, 256
_AHEAD = (2, 16)
"""Begun at once: about so many bytes, but at least and at most so many records."""


@dataclass(slots=True)
class _Copy:
    load: Load
    target: int
    source: int
    nbytes: int
    began: float = 0.0


def measure_link(device: Device, target: int, source: int, nbytes: int) -> float:
    """Bytes per second that copies of so many bytes between these addresses reach; takes a few milliseconds."""
    times = min(max(1, _MEASURED_BYTES // nbytes), _MEASURED_MOST)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        device.copies.move([(target, source, nbytes)] * times)
        device.copies.mark().wait()
        best = min(best, time.perf_counter() - began)
    return times * nbytes / best


class DeviceCopies:
    """Copies of records of about `record_bytes`, announced in `table`."""

    def __init__(self, device: Device, table: DeviceTable, record_bytes: int) -> None:
        self.stats = TransferStats()
        self.read_bytes = 0
        """Of the copies that are complete and told of."""
        self._lane = device.copies
        self._table = table
        self.ahead = min(max(_AHEAD[0], _AHEAD_BYTES // record_bytes), _AHEAD[1])
        """Records begun at once."""
        self._waiting: dict[Priority, deque[_Copy]] = {Priority.DEMAND: deque(), Priority.PREFETCH: deque()}
        self._begun: deque[tuple[_Copy, Mark]] = deque()

    def submit(self, load: Load, target: int, source: int, nbytes: int) -> None:
        """Copy a record from pinned memory into a slot that may be written, when its turn comes."""
        self._waiting[load.priority].append(_Copy(load, target, source, nbytes))

    def cancel(self, load_id: int) -> Cancelled | None:
        """Take back what has not begun; None for what has, which ends as usual."""
        for queue in self._waiting.values():
            for copy in queue:
                if copy.load.load_id == load_id:
                    queue.remove(copy)
                    return Cancelled(load_id)
        return None

    def after(self, mark: Mark) -> None:
        """What begins from now on waits for the mark."""
        self._lane.after(mark)

    def complete(self) -> list[tuple[Load, Loaded]]:
        """What is complete and was not told of yet, in the order in which it was begun."""
        done = []
        begun = self._begun
        while begun and begun[0][1].done():
            copy, _ = begun.popleft()
            self._count(copy)
            done.append((copy.load, Loaded(copy.load.load_id)))
        return done

    def begin(self) -> None:
        """Begin what comes next, as far ahead as is good."""
        for queue in self._waiting.values():
            while queue and len(self._begun) < self.ahead:
                self._begin(queue.popleft())

    def wait(self) -> None:
        """Until the first that has begun is complete; there may be none."""
        if self._begun:
            self._begun[0][1].wait()

    @property
    def begun(self) -> int:
        """Copies under way, as far as is known."""
        return len(self._begun)

    def depth(self) -> int:
        """Copies that wait or are under way."""
        return len(self._begun) + sum(map(len, self._waiting.values()))

    def _begin(self, copy: _Copy) -> None:
        copy.began = time.perf_counter()
        slot = copy.load.slot
        record = (copy.target, copy.source, copy.nbytes)
        self._lane.move([self._table.announce(copy.load.expert, slot), record, self._table.complete(slot)])
        self._begun.append((copy, self._lane.mark()))

    def _count(self, copy: _Copy) -> None:
        seconds = time.perf_counter() - copy.began
        self.read_bytes += copy.nbytes
        self.stats.busy_s += seconds
        self.stats.latency_s += seconds
        self.stats.latency_counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
