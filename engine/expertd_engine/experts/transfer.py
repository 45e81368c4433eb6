"""Transfer threads: they execute loads and own nothing. Demand overtakes prefetch; what has begun is never recalled.

The engine thread submits, promotes and cancels; results come back through `completions` as ledger events.
"""

from __future__ import annotations

import ctypes
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

from expertd_engine.experts.async_reads import AsyncReads
from expertd_engine.experts.events import Cancelled, ExpertId, Failed, Load, Loaded, Priority

Completion = Loaded | Failed | Cancelled

AT_ONCE = 32
"""Demands that one thread reads at once, where the system lets it."""
_GROUPS = 4
"""Of so many, a quarter is waited for at a time: who sleeps until each has come wakes up on a core that computes."""
LATENCY_BOUNDS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class RecordReader(Protocol):
    """Reads one whole record, checked, into memory; called from several threads at once."""

    def read_record(self, expert: ExpertId, buffer: memoryview) -> None:
        """Fill `buffer` (page-aligned, as long as the record). Raises OSError or StoreError."""
        ...

    def place_of(self, expert: ExpertId) -> tuple[int, int] | None:
        """File and offset of a record that may be read with others; None: by `read_record` alone."""
        ...


@dataclass(slots=True)
class TransferStats:
    """Cumulative; `latency_counts[i]` counts loads that took ≤ `LATENCY_BOUNDS_S[i]`, the last one all longer."""

    busy_s: float = 0.0
    """Of threads, reading."""
    latency_s: float = 0.0
    """Of all loads, from when a thread took them."""
    latency_counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))


@dataclass(slots=True)
class _Job:
    load: Load
    buffer: memoryview
    place: tuple[int, int] | None = None
    """File and offset, where it is read with others."""


class Completions:
    """What the threads have to say to the engine thread, in order.

    `read_bytes` are those of the loads it has been told of: so they agree with the ledger's between any two events.
    """

    def __init__(self) -> None:
        self.read_bytes = 0
        self._queue: SimpleQueue[tuple[Completion, int]] = SimpleQueue()

    def put(self, completion: Completion, read_bytes: int = 0) -> None:
        self._queue.put((completion, read_bytes))

    def get(self, timeout: float | None = None) -> Completion:
        """The next, waiting for one. Raises queue.Empty after `timeout` seconds."""
        completion, read_bytes = self._queue.get(timeout=timeout)
        self.read_bytes += read_bytes
        return completion

    def empty(self) -> bool:
        return self._queue.empty()


class Transfers:
    """A pool of `threads` reader threads behind two queues."""

    def __init__(self, reader: RecordReader, threads: int) -> None:
        self.completions = Completions()
        self.stats = TransferStats()
        self.loaded: Callable[[Load], None] = _nobody
        """Called by the thread that has read a record, before the engine thread hears of it: native code may be running
        there, which can use the record at once. It must be quick, and may not raise."""
        self._reader = reader
        self._condition = threading.Condition()
        self._queues: dict[Priority, deque[_Job]] = {Priority.DEMAND: deque(), Priority.PREFETCH: deque()}
        self._reading = 0
        self._closed = False
        self.one_by_one: str | None = None
        """Why no thread reads many at once; None where they do."""
        rings = self._rings(threads)
        self._threads = [
            threading.Thread(target=self._work, args=[ring], name=f"transfer-{i}", daemon=True)
            for i, ring in enumerate(rings)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def read_bytes(self) -> int:
        """Of all loads that came to their end."""
        return self.completions.read_bytes

    def submit(self, load: Load, buffer: memoryview) -> None:
        with self._condition:
            if not any(self._queues.values()):  # else who has been woken wakes the next: waking a thread is what costs
                self._condition.notify()
            self._queues[load.priority].append(_Job(load, buffer))

    def promote(self, load_id: int) -> None:
        """Move a queued prefetch behind the queued demands. No effect once it has begun."""
        with self._condition:
            job = self._take(Priority.PREFETCH, load_id)
            if job is not None:
                self._queues[Priority.DEMAND].append(job)

    def cancel(self, load_id: int) -> None:
        """Give a queued load up (`Cancelled` follows). One that has begun ends as `Loaded` or `Failed`."""
        with self._condition:
            job = self._take(Priority.PREFETCH, load_id) or self._take(Priority.DEMAND, load_id)
        if job is not None:
            self.completions.put(Cancelled(load_id))

    def depth(self) -> int:
        """Loads that wait for a thread or are in one."""
        with self._condition:
            return self._reading + sum(map(len, self._queues.values()))

    def close(self) -> None:
        """Stop the threads after the loads they are in; queued ones are forgotten."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self, priority: Priority, load_id: int) -> _Job | None:
        queue = self._queues[priority]
        for job in queue:
            if job.load.load_id == load_id:
                queue.remove(job)
                return job
        return None

    def _rings(self, threads: int) -> list[AsyncReads | None]:
        rings: list[AsyncReads | None] = []
        for _ in range(threads):
            try:
                rings.append(AsyncReads(AT_ONCE))
            except OSError as error:
                self.one_by_one = error.strerror or str(error)
                rings.append(None)
        return rings

    def _next(self, most: int) -> list[_Job]:
        """The next, with up to `most` demands in line behind it that may be read together. Empty once closed."""
        with self._condition:
            while not self._closed:
                for priority in Priority:
                    if self._queues[priority]:
                        jobs = self._with_others(self._queues[priority], most if priority is Priority.DEMAND else 1)
                        self._reading += len(jobs)
                        if any(self._queues.values()):
                            self._condition.notify()
                        return jobs
                self._condition.wait()
        return []

    def _with_others(self, queue: deque[_Job], most: int) -> list[_Job]:
        jobs = [queue.popleft()]
        while queue and len(jobs) < most and self._goes_together(jobs[0]) and self._goes_together(queue[0]):
            jobs.append(queue.popleft())
        return jobs

    def _goes_together(self, job: _Job) -> bool:
        job.place = job.place or self._reader.place_of(job.load.expert)
        return job.place is not None

    def _work(self, ring: AsyncReads | None) -> None:
        while jobs := self._next(1 if ring is None else ring.most):
            began = time.perf_counter()
            if ring is None or len(jobs) == 1:
                self._read(jobs[0], began, began)
            else:
                self._read_together(ring, jobs, began)
        if ring is not None:
            ring.close()

    def _read(self, job: _Job, began: float, last: float) -> float:
        completion: Completion
        try:
            self._reader.read_record(job.load.expert, job.buffer)
            completion = Loaded(job.load.load_id)
            self.loaded(job.load)
        except Exception as error:  # the top of a read: a thread that dies of one leaves the engine waiting for ever
            completion = Failed(job.load.load_id, f"{type(error).__name__}: {error}")
        return self._ended([(job, completion)], began, last)

    def _read_together(self, ring: AsyncReads, jobs: Sequence[_Job], began: float) -> None:
        """What the kernel does not take, or does not read whole, is read again by itself, which says what is wrong."""
        try:
            begun = ring.begin([_asked(job) for job in jobs])
        except OSError:
            begun = 0
        least, last = max(1, begun // _GROUPS), began
        while ring.under_way:
            ended = [(jobs[number], nbytes) for number, nbytes in ring.wait(least)]
            whole = [job for job, nbytes in ended if nbytes == len(job.buffer)]
            for job in whole:
                self.loaded(job.load)
            last = self._ended([(job, Loaded(job.load.load_id)) for job in whole], began, last)
            for job in (job for job, nbytes in ended if nbytes != len(job.buffer)):
                last = self._read(job, began, last)
        for job in jobs[begun:]:
            last = self._read(job, began, last)

    def _ended(self, done: Sequence[tuple[_Job, Completion]], began: float, last: float) -> float:
        """Taken at `began` by a thread whose `last` ended then. Returns when these did."""
        with self._condition:
            now = time.perf_counter()
            self._reading -= len(done)
            self.stats.busy_s += now - last
            self.stats.latency_s += len(done) * (now - began)
            self.stats.latency_counts[bisect_left(LATENCY_BOUNDS_S, now - began)] += len(done)
        for job, completion in done:
            self.completions.put(completion, len(job.buffer) if isinstance(completion, Loaded) else 0)
        return now


def _asked(job: _Job) -> tuple[int, int, int, int]:
    assert job.place is not None, "those that go together have one"
    return *job.place, ctypes.addressof(ctypes.c_char.from_buffer(job.buffer)), len(job.buffer)


def _nobody(load: Load) -> None:
    return None
