"""Carries records from the host's memory into a device's slots, a few at a time, on the lane for copies.

Owner: the engine thread, which submits and asks; there are no threads here. What has not begun can be taken back; what
has begun ends. Only so much is begun ahead that the lane does not run dry until somebody asks again: what a kernel
reads over the same link comes between records. Not so where a step's records are fetched together: its kernels read
nothing themselves then.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from expertd_engine.experts.device_streams import AddressMove, Device, Mark
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


@dataclass(slots=True)
class _Together:
    """Copies that are told of together."""

    number: int
    moves: Iterator[AddressMove]
    """That the lane does not have yet."""
    sizes: Sequence[int]
    """Bytes of each record."""
    began: float | None = None
    ended: Mark | None = None


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
        self._together: deque[_Together] = deque()
        self._told = 0.0
        """When the last of them were."""

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
            seconds = time.perf_counter() - copy.began
            self.stats.busy_s += seconds
            self._count(copy.nbytes, seconds)
            done.append((copy.load, Loaded(copy.load.load_id)))
        return done

    def begin(self) -> None:
        """Begin what comes next, as far ahead as is good."""
        for queue in self._waiting.values():
            while queue and len(self._begun) < self.ahead:
                self._begin(queue.popleft())

    def wait(self) -> None:
        """Until the first that has begun, and all that are told of together, are complete; there may be none."""
        if self._begun:
            self._begun[0][1].wait()
        self.end_fetches()

    @property
    def begun(self) -> int:
        """Copies under way, as far as is known."""
        return len(self._begun)

    def depth(self) -> int:
        """Copies that wait or are under way."""
        alone = len(self._begun) + sum(map(len, self._waiting.values()))
        return alone + sum(len(one.sizes) for one in self._together)

    # ------------------------------------------------------------ together

    def fetch(self, number: int, moves: Iterator[AddressMove], sizes: Sequence[int]) -> None:
        """Make these moves, which carry records of these sizes, in order, as `give` says, behind those before."""
        self._together.append(_Together(number, moves, sizes))

    def give(self, most: int) -> None:
        """Let the lane have up to so many moves more."""
        for one in self._together:
            if one.ended is None:
                most -= self._give(one, most)
            if most <= 0:
                return

    def give_all(self) -> None:
        """Let the lane have all moves."""
        for one in self._together:
            self._give(one, None)

    def end_fetches(self) -> None:
        """Wait until all that was to be copied together is complete."""
        self.give_all()
        for one in self._together:
            assert one.ended is not None, "all is given"
            one.ended.wait()

    def fetched(self) -> list[int]:
        """The numbers of those that are all complete and were not told of yet."""
        numbers, together = list[int](), self._together
        while together and (ended := together[0].ended) is not None and ended.done():
            one, now = together.popleft(), time.perf_counter()
            assert one.began is not None, "what has ended was begun"
            seconds = now - max(one.began, self._told)  # it waits for the one before
            self._told = now
            self.stats.busy_s += seconds
            for place, nbytes in enumerate(one.sizes, 1):  # when each was complete is not known: evenly
                self._count(nbytes, seconds * place / len(one.sizes))
            numbers.append(one.number)
        return numbers

    def _give(self, one: _Together, most: int | None) -> int:
        """How many moves the lane has got. None: all that there are."""
        moves = list(islice(one.moves, most))
        if one.began is None:
            one.began = time.perf_counter()
        self._lane.move(moves)
        if one.ended is None and (most is None or len(moves) < most):
            one.ended = self._lane.mark()
        return len(moves)

    # ------------------------------------------------------------ one by one

    def _begin(self, copy: _Copy) -> None:
        copy.began = time.perf_counter()
        slot = copy.load.slot
        record = (copy.target, copy.source, copy.nbytes)
        self._lane.move([self._table.announce(copy.load.expert, slot), record, self._table.complete(slot)])
        self._begun.append((copy, self._lane.mark()))

    def _count(self, nbytes: int, seconds: float) -> None:
        self.read_bytes += nbytes
        self.stats.latency_s += seconds
        self.stats.latency_counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
