"""Records routes while an engine serves: windows of steps, a share of all, in bounded memory and disk. Owns the parts.

While no window is open a step costs one comparison. Parts are written by a thread of its own; the oldest go when the
folder has reached its bound.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from expertd_engine.errors import ConfigError
from expertd_engine.lab.trace import SUFFIX, Ids, Trace, TraceHeader, write_part

logger = logging.getLogger(__name__)

WINDOW_STEPS = 256
"""Steps recorded in a row: policies are about what is used again, so single steps would say nothing."""
BUFFER_BYTES = 8 * 2**20
"""Rows kept in memory before a part is written."""


class TraceRecorder:
    """A `Watch` on steps. Raises ConfigError for a folder that cannot be written to.

    The header's share of all steps is recorded, `limit_bytes` of parts are kept in the folder; with `hidden`, what the
    routers saw too. `unroll`: each row of a step is recorded as a decoding step of its own, as text is when generated.
    """

    def __init__(
        self,
        folder: Path,
        header: TraceHeader,
        *,
        limit_bytes: int,
        hidden: bool = False,
        unroll: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = [(path, path.stat().st_size) for path in sorted(folder.glob(f"*{SUFFIX}"))]
        except OSError as error:
            raise ConfigError(f"trace_dir: cannot write to {folder}: {error.strerror}") from None
        self.sees_hidden = hidden
        self.rows = 0
        """Recorded since start."""
        self.failure: str | None = None
        """Why nothing is recorded any more."""
        self._folder = folder
        self._header = header
        self._limit = limit_bytes
        self._unroll = unroll
        self._unrolled = 0
        self._cycle = max(WINDOW_STEPS, round(WINDOW_STEPS / header.share))
        self._clock = clock
        self._began = clock()
        self._prefix = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}"
        self._step = -1
        self._open: _Step | None = None
        self._kept: list[_Step] = []
        self._buffered = 0
        self._parts = deque(before)
        """Oldest first, those of earlier recorders too: the bound is the folder's."""
        self._bytes = sum(size for _, size in before)
        self._writer = ThreadPoolExecutor(1, "trace")

    def begin_step(self, streams: Sequence[int], decode: Sequence[bool]) -> bool:
        """A step of rows of these sequences begins; whether it is recorded, and so wants to be told of its routes."""
        self._step += 1
        if self._step % self._cycle >= WINDOW_STEPS or self.failure is not None:
            self._flush()
            return False
        now_us = round((self._clock() - self._began) * 1e6)
        self._open = _Step(self._step, now_us, np.array(streams, np.int64), np.array(decode, bool))
        return True

    def routed(self, layer: int, chosen: Ids, hidden: torch.Tensor | None) -> None:
        """Rows `[T, H]` were routed to `chosen` `[T, K]` by MoE layer `layer`; layers come in order."""
        if self._open is None:
            return
        small = np.uint8 if self._header.width <= 256 else np.uint16
        self._open.routes.append(np.sort(chosen.astype(small), axis=1))
        if hidden is not None and self.sees_hidden:
            self._open.hidden.append(hidden.to(torch.float16).numpy().copy())

    def end_step(self, *, well: bool) -> None:
        """The step has ended; one that did not end `well` is forgotten."""
        step, self._open = self._open, None
        if step is None or not well or len(step.routes) != len(self._header.experts):
            return
        self._kept.append(step)
        self.rows += len(step.streams)
        self._buffered += sum(part.nbytes for part in (*step.routes, *step.hidden)) + 24 * len(step.streams)
        if self._buffered >= BUFFER_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._writer.shutdown()

    def _flush(self) -> None:
        if self._kept:
            steps, self._kept, self._buffered = self._kept, [], 0
            self._writer.submit(self._write, self._folder / f"{self._prefix}-{steps[0].number:09d}{SUFFIX}", steps)

    def _write(self, path: Path, steps: Sequence[_Step]) -> None:
        """On the writer's thread."""
        try:
            trace = _joined(self._header, steps)
            if self._unroll:
                numbers = np.arange(self._unrolled, self._unrolled + len(trace))
                trace = replace(trace, steps=numbers, decode=np.ones(len(trace), bool))
                self._unrolled += len(trace)
            size = write_part(path, trace)
            self._parts.append((path, size))
            self._bytes += size
            while self._bytes > self._limit:
                oldest, size = self._parts.popleft()
                oldest.unlink(missing_ok=True)
                self._bytes -= size
        except OSError as error:
            self.failure = f"routes are no longer recorded: cannot write {path}: {error.strerror}"
            logger.warning("%s", self.failure)


class _Step:
    """Routes of one step, as they come."""

    def __init__(self, number: int, time_us: int, streams: Ids, decode: NDArray[np.bool_]) -> None:
        self.number = number
        self.time_us = time_us
        self.streams = streams
        self.decode = decode
        self.routes: list[NDArray[np.uint8 | np.uint16]] = []
        """`[T, K]` by layer."""
        self.hidden: list[NDArray[np.float16]] = []


def _joined(header: TraceHeader, steps: Sequence[_Step]) -> Trace:
    rows = [len(step.streams) for step in steps]
    states = [np.stack(step.hidden, axis=1) for step in steps if step.hidden]
    return Trace(
        header,
        np.concatenate([np.stack(step.routes, axis=1) for step in steps]).astype(np.int64),
        np.repeat([step.number for step in steps], rows),
        np.concatenate([step.streams for step in steps]),
        np.concatenate([step.decode for step in steps]),
        np.repeat([step.time_us for step in steps], rows),
        np.concatenate(states) if states else None,
    )
