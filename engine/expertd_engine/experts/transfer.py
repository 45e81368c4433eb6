"""Transfer threads: they execute loads and own nothing. Demand overtakes prefetch; what has begun is never recalled.

The engine thread submits, promotes and cancels; results come back through `completions` as ledger events.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

from expertd_engine.experts.events import Cancelled, ExpertId, Failed, Load, Loaded, Priority

Completion = Loaded | Failed | Cancelled

LATENCY_BOUNDS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class RecordReader(Protocol):
    """Reads one whole record, checked, into memory; called from several threads at once."""

    def read_record(self, expert: ExpertId, buffer: memoryview) -> None:
        """Fill `buffer` (page-aligned, as long as the record). Raises OSError or StoreError."""
        ...


@dataclass(slots=True)
class TransferStats:
    """Cumulative; `latency_counts[i]` counts loads that took ≤ `LATENCY_BOUNDS_S[i]`, the last one all longer."""

    busy_s: float = 0.0
    latency_counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))


@dataclass(slots=True)
class _Job:
    load: Load
    buffer: memoryview


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
        self._threads = [threading.Thread(target=self._work, name=f"transfer-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def read_bytes(self) -> int:
        """Of all loads that came to their end."""
        return self.completions.read_bytes

    def submit(self, load: Load, buffer: memoryview) -> None:
        with self._condition:
            self._queues[load.priority].append(_Job(load, buffer))
            self._condition.notify()

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

    def _next(self) -> _Job | None:
        with self._condition:
            while not self._closed:
                for priority in Priority:
                    if self._queues[priority]:
                        self._reading += 1
                        return self._queues[priority].popleft()
                self._condition.wait()
        return None

    def _work(self) -> None:
        while (job := self._next()) is not None:
            began = time.perf_counter()
            completion: Completion
            try:
                self._reader.read_record(job.load.expert, job.buffer)
                completion = Loaded(job.load.load_id)
                self.loaded(job.load)
            except Exception as error:  # a thread's loop top: a thread that dies leaves the engine waiting for ever
                completion = Failed(job.load.load_id, f"{type(error).__name__}: {error}")
            self._count(time.perf_counter() - began)
            self.completions.put(completion, len(job.buffer) if isinstance(completion, Loaded) else 0)

    def _count(self, seconds: float) -> None:
        with self._condition:
            self._reading -= 1
            self.stats.busy_s += seconds
            self.stats.latency_counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1


def _nobody(load: Load) -> None:
    return None
