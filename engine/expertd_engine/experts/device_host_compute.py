"""Experts that a device's step misses, computed by the processor from the host tier's records while the step runs.

Owner: the engine thread. The memory that both sides see lies here; who writes into it when is the device's and the
native thread's business.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from expertd_engine.errors import EngineError
from expertd_engine.experts.device_streams import Device
from expertd_engine.kernels.host_experts import Counts, HostLayer, HostThread, Mailbox
from expertd_engine.kernels.library import Library

if TYPE_CHECKING:
    from expertd_engine.experts.device_sharing import Sharing
    from expertd_engine.kernels.cuda.host_experts import Mailbox as DeviceMailbox

_LINE_WORDS = 32
"""Between two words that different sides write."""
_MEASURED_BYTES = 512 * 2**20
_WARMING = 4
"""Requests before those that are timed."""
_PATIENCE_S = 60.0
"""For one answer, at start."""


@dataclass(frozen=True, slots=True)
class Room:
    """Of the largest request: rows, choices of each, distinct experts, and the length of a row."""

    rows: int
    top_k: int
    experts: int
    hidden: int


class HostCompute:
    """`threads` of the processor, ready to compute `layers`' experts for `device`. Raises ResourceError, KernelsMissing
    and ValueError as pinning and the kernels do.
    """

    def __init__(self, library: Library, device: Device, layers: Sequence[HostLayer], room: Room, threads: int) -> None:
        def ints(*shape: int) -> Tensor:
            return device.pinned(_product(shape), torch.int32).view(shape)

        def floats(*shape: int) -> Tensor:
            return device.pinned(_product(shape), torch.float32).view(shape)

        words = ints(3 * _LINE_WORDS)
        self.posted, self.done, self.head = words[:1], words[_LINE_WORDS:][:1], words[2 * _LINE_WORDS :][:3]
        """int32 `[1]`, `[1]`, `[3]`; as `kernels.cuda.host_experts.Mailbox`, and so are the others."""
        self.experts, self.pairs = ints(4, room.experts), ints(room.rows * room.top_k)
        self.x, self.weights = floats(room.rows, room.hidden), floats(room.rows, room.top_k)
        self.sums = device.pinned(room.rows * room.hidden, torch.int64).view(room.rows, room.hidden)
        self.lands = False
        """Whether steps read a part of what they miss themselves, into slots: else residents change by copies alone."""
        self.computed = self.computed_bytes = 0
        """Experts, and bytes of their records."""
        self.busy_s = 0.0
        """Time from requests to their answers, as the processor sees it."""
        self.threads, self.layers, self._room = threads, layers, room
        parts = (self.posted, self.done, self.head, *self.experts, self.pairs, self.x, self.weights, self.sums)
        mailbox = Mailbox(*(part.data_ptr() for part in parts), room.rows, room.experts, room.top_k)
        self._thread = HostThread(library, threads, layers, mailbox)
        self._first = Counts()
        """What was computed before the first step."""
        self._asking: deque[bool] = deque()
        """Of the launches that run, the first one first: whether they ask."""
        self._watches = False
        self.sharing: Sharing | None = None
        """What a device is told to leave to the processor; None before there is one that asks."""

    def mailbox(self, where: torch.device, sharing: Sharing) -> DeviceMailbox:
        """For the kernels of a device, which ask for what `sharing` leaves. Ask for it after `measure`."""
        from expertd_engine.kernels.cuda.host_experts import Mailbox as DeviceMailbox  # needs triton
        from expertd_engine.kernels.cuda.resolve import NEVER, Left

        def words(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=where)

        self.sharing = sharing
        experts = max(len(one.addresses) for one in self.layers)
        shared = (self.posted, self.head, self.experts, self.pairs, self.x, self.weights, self.sums)
        left = Left(sharing.splits, words(len(self.layers), experts, value=NEVER), words(1))
        sent = self.posted.to(where, copy=True)
        return DeviceMailbox(
            *shared, sent=sent, arrived=words(1), left=left, later=sharing.later, shares=sharing.divides
        )

    def shared_bytes(self, layer: int, cut: int) -> int:
        """Of an expert that is divided there: what its device reads."""
        struct = self.layers[layer].struct
        return int(struct.record_bytes * cut // struct.layout.inner)

    def begin_step(self, *, may_ask: bool = True) -> bool:
        """A step is about to be launched; whether it is to ask: then its requests are looked for. `may_ask`: its
        program can; where the processor computes all that is missing it does."""
        asks = self.sharing is None or self.sharing.before_launch(may_ask=may_ask)
        self._asking.append(asks)
        if asks and not self._watches:
            self._watches = True
            self._thread.begin()
        return asks

    def launched(self) -> None:
        """It is under way."""
        if self.sharing is not None:
            self.sharing.after_launch()

    def end_step(self) -> float:
        """The first that runs has ended: the seconds that the processor computed since another had. Raises EngineError
        where it could not."""
        asked = bool(self._asking) and self._asking.popleft()
        if self.sharing is not None:
            self.sharing.end_step(asked=asked)
        if not asked:
            return 0.0
        before, self._watches = self.busy_s, any(self._asking)
        try:
            counts = self._thread.look() if self._watches else self._thread.end()
        except ValueError as error:
            raise EngineError(f"the processor could not compute a missing expert: {error}") from error
        first = self._first
        self.computed, self.computed_bytes = counts.experts - first.experts, counts.bytes - first.bytes
        self.busy_s = (counts.nanoseconds - first.nanoseconds) / 1e9
        return self.busy_s - before

    def give_up(self) -> None:
        """Steps have failed, and nothing runs: there is nothing to look for any more. Raises as `end_step`."""
        while self._asking:
            self.end_step()

    def ask(self, layer: int, experts: Sequence[int], cuts: Sequence[int] = ()) -> None:
        """What a device would ask for one row, of which row 0 of `x` and `weights` are to be there; and wait for it.
        `cuts`: of each expert the first neuron asked for, all where there are none."""
        self._post(layer, experts, cuts)
        self._wait(layer)

    def _post(self, layer: int, experts: Sequence[int], cuts: Sequence[int] = ()) -> None:
        count = len(experts)
        assert count <= self._room.top_k
        choices = np.arange(count)
        self.experts.numpy()[:, :count] = experts, choices, choices + 1, cuts or [0] * count
        self.pairs.numpy()[:count] = choices
        self.head.numpy()[:] = layer, 1, count
        self.posted.numpy()[0] += 1

    def _wait(self, layer: int) -> None:
        posted, done, until = self.posted.numpy(), self.done.numpy(), time.monotonic() + _PATIENCE_S
        while done[0] != posted[0]:
            if time.monotonic() > until:
                raise EngineError(f"the processor computed no expert of layer {layer} in {_PATIENCE_S:.0f} s")

    def measure(self, beside: Callable[[int], None]) -> tuple[float, float]:
        """Bytes of records a second, a few experts of one row at a time, as a step's layers ask for them; and the
        seconds that a request for one alone takes beyond that. `beside` has a device read so many bytes meanwhile: both
        read one memory. No step has run: counts begin anew."""
        self.x.fill_(1.0)
        self.weights.fill_(1.0)
        asked = self._few_of_each_layer()
        self.begin_step()
        for layer, experts in asked[:_WARMING]:
            self.ask(layer, experts)  # threads wake up, cores rise to their pace
        few = [self._timed(layer, experts, beside) for layer, experts in asked]
        # Second: read so long ago, not in caches.
        alone = [self._timed(layer, experts[:1], beside) for layer, experts in asked]
        self._first = self._thread.end()
        self._asking.clear()
        self._watches = False
        bytes_per_s = median(nbytes / seconds for seconds, nbytes in few)
        return bytes_per_s, max(0.0, median(seconds - nbytes / bytes_per_s for seconds, nbytes in alone))

    def _timed(self, layer: int, experts: range, beside: Callable[[int], None]) -> tuple[float, int]:
        """The seconds from a request to its answer, and the bytes of its records."""
        nbytes = len(experts) * self.layers[layer].struct.record_bytes
        beside(nbytes)
        began = time.perf_counter()
        self._post(layer, experts)
        self._wait(layer)
        return time.perf_counter() - began, nbytes

    def close(self) -> None:
        """End the threads. No step runs."""
        self._thread.close()

    def _few_of_each_layer(self) -> list[tuple[int, range]]:
        """Requests for different experts, as many as take a few milliseconds to read from memory."""
        asked: list[tuple[int, range]] = []
        left = float(_MEASURED_BYTES)
        for first in range(0, self._room.experts, self._room.top_k):
            for layer, one in enumerate(self.layers):
                some = range(first, min(first + self._room.top_k, len(one.addresses)))
                if some and left > 0:
                    asked.append((layer, some))
                    left -= len(some) * one.struct.record_bytes
        return asked


def _product(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
