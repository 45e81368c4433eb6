"""A device and a disk without either: slots that fill piece by piece, reads that take virtual time, fail or stall.

`SimDisk` stands where `Transfers` stands, `SimSlab` where `Slab` does. Nothing here decides anything; what must never
happen to memory (two loads writing one slot, a slot returned while it is written) is noticed here and raised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import NamedTuple

from expertd_engine.bench.virtual_clock import Clock
from expertd_engine.experts.events import Cancelled, ExpertId, Failed, Load, Loaded, Priority
from expertd_engine.experts.transfer import Completion

UNIT = 4096
"""Bytes of a piece: slots fill, and are returned, by pieces."""


class Violation(AssertionError):
    """A law is broken."""


class View(NamedTuple):
    """The first `pieces` pieces of a slot: what a load writes to."""

    slot: int
    pieces: int


def piece_of(expert: ExpertId, index: int) -> int:
    """Content of one piece of a record."""
    return (expert.layer << 16 | expert.expert << 4 | index) + 1


def record_of(expert: ExpertId, pieces: int) -> tuple[int, ...]:
    """Content of a whole record."""
    return tuple(piece_of(expert, index) for index in range(pieces))


class SimSlab:
    """Slots of `slot_pieces` pieces each. What is committed is what was reserved for a load and not returned."""

    def __init__(self, num_slots: int, slot_pieces: int) -> None:
        self._slots = [[0] * slot_pieces for _ in range(num_slots)]
        self._committed = [0] * num_slots
        self.committed = 0
        """Pieces of all slots."""
        self.writer: dict[int, int] = {}
        """The load that writes to a slot."""
        self.changed: Callable[[], None] = lambda: None
        """Called whenever `committed` has changed."""

    def view(self, slot: int, num_bytes: int) -> View:
        return View(slot, num_bytes // UNIT)

    def drop(self, slot: int, keep_bytes: int = 0) -> None:
        if slot in self.writer:
            raise Violation(f"slot {slot} is returned while load {self.writer[slot]} writes to it")
        keep = keep_bytes // UNIT
        pieces = self._slots[slot]
        pieces[keep:] = [0] * (len(pieces) - keep)
        self._commit(slot, min(keep, self._committed[slot]))

    def reserve(self, view: View, load_id: int) -> None:
        """A load was given the slot: from now on its bytes count, whenever they come."""
        if view.slot in self.writer:
            raise Violation(f"loads {self.writer[view.slot]} and {load_id} write to slot {view.slot}")
        self.writer[view.slot] = load_id
        self._commit(view.slot, max(view.pieces, self._committed[view.slot]))

    def let_go(self, view: View) -> None:
        """Its load has ended."""
        del self.writer[view.slot]

    def write(self, view: View, index: int, content: int) -> None:
        self._slots[view.slot][index] = content

    def read(self, slot: int, pieces: int) -> tuple[int, ...]:
        """What whoever computes with the slot now finds."""
        return tuple(self._slots[slot][:pieces])

    def _commit(self, slot: int, pieces: int) -> None:
        self.committed += pieces - self._committed[slot]
        self._committed[slot] = pieces
        self.changed()


@dataclass(slots=True)
class DiskFaults:
    """How bad the disk is. All are probabilities but `unreadable`, the experts whose reads fail until it is cleared."""

    fail: float = 0.0
    stall: float = 0.0
    late: float = 0.0
    """That the news of an ended load comes late."""
    unreadable: set[ExpertId] = field(default_factory=set)
    failing: range = range(0)
    """Numbers of the reads that fail, counted from 0."""

    def clear(self) -> None:
        self.fail = self.stall = self.late = 0.0
        self.unreadable.clear()
        self.failing = range(0)


class Completions:
    """The queue of ended loads. Waiting on it lets virtual time pass; waiting for what never comes is a violation."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._arrived: deque[Completion] = deque()

    def put(self, completion: Completion) -> None:
        self._arrived.append(completion)

    def empty(self) -> bool:
        return not self._arrived

    def get(self, timeout: float | None = None) -> Completion:
        """`timeout` never passes: what takes long in virtual time is waited for."""
        while not self._arrived:
            if not self._clock.run_next():
                raise Violation("lost wakeup: a step waits for a load, and none is under way")
        return self._arrived.popleft()


class SimDisk:
    """Executes loads, `threads` at once, demands first; each writes its pieces one by one, at times of its own."""

    def __init__(self, clock: Clock, slab: SimSlab, threads: int, rng: Random, faults: DiskFaults) -> None:
        self.completions = Completions(clock)
        self.faults = faults
        self.reads = 0
        """Begun since start."""
        self._clock, self._slab, self._rng = clock, slab, rng
        self._idle = threads
        self._queues: dict[Priority, list[tuple[Load, View]]] = {Priority.DEMAND: [], Priority.PREFETCH: []}

    def submit(self, load: Load, view: View) -> None:
        self._slab.reserve(view, load.load_id)
        self._queues[load.priority].append((load, view))
        self._begin_next()

    def promote(self, load_id: int) -> None:
        job = self._take(Priority.PREFETCH, load_id)
        if job is not None:
            self._queues[Priority.DEMAND].append(job)

    def cancel(self, load_id: int) -> None:
        job = self._take(Priority.PREFETCH, load_id) or self._take(Priority.DEMAND, load_id)
        if job is not None:
            self._slab.let_go(job[1])
            self.completions.put(Cancelled(load_id))

    def close(self) -> None:
        return None

    def _take(self, priority: Priority, load_id: int) -> tuple[Load, View] | None:
        queue = self._queues[priority]
        for index, (load, _) in enumerate(queue):
            if load.load_id == load_id:
                return queue.pop(index)
        return None

    def _begin_next(self) -> None:
        for queue in self._queues.values():
            while queue and self._idle:
                self._idle -= 1
                self._begin(*queue.pop(0))

    def _begin(self, load: Load, view: View) -> None:
        rng, faults, expert = self._rng, self.faults, load.expert
        seconds = rng.uniform(0.2, 2.0) * (50.0 if rng.random() < faults.stall else 1.0)
        fails = expert in faults.unreadable or rng.random() < faults.fail or self.reads in faults.failing
        self.reads += 1
        written = rng.randrange(view.pieces) if fails else view.pieces
        for index in range(written):
            write = partial(self._slab.write, view, index, piece_of(expert, index))
            self._clock.at(seconds * (index + 1) / view.pieces, write)
        self._clock.at(seconds * view.pieces / view.pieces, partial(self._end, load, view, fails))

    def _end(self, load: Load, view: View, fails: bool) -> None:
        self._idle += 1
        completion: Completion = Failed(load.load_id, "read error") if fails else Loaded(load.load_id)

        def tell() -> None:
            self._slab.let_go(view)
            self.completions.put(completion)

        if self._rng.random() < self.faults.late:
            self._clock.at(self._rng.uniform(0.0, 5.0), tell)
        else:
            tell()
        self._begin_next()
