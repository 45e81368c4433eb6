"""Every expert's record in the host's memory, where the device reads it in place: the tier below its slots.

Owner: the engine thread, at start. The mapping is ours and pinned piece by piece, because torch's pinned allocator
rounds sizes up to powers of two. Nothing is written after `fill`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch
from torch import Tensor

from expertd_engine.errors import ResourceError
from expertd_engine.experts.device_layout import HOME
from expertd_engine.experts.device_streams import Device
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.slab import Slab
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.experts.transfer import RecordReader

logger = logging.getLogger(__name__)

_PIECE_BYTES = 2**30
"""What is pinned at once, in whole records: a copy must not cross from one pinned range to another."""


class HostTier:
    """Room for all records of a store. Raises ResourceError when `available` bytes of memory are not enough."""

    complete = True
    """All records are there."""

    def __init__(self, index: StoreIndex, device: Device, available: int) -> None:
        self._record_bytes = [index.record_bytes(layer) for layer in range(len(index.layers))]
        self._experts = [layer.num_experts for layer in index.layers]
        self._offsets = [layer.offset for layer in index.layers]
        spans = [nbytes * count for nbytes, count in zip(self._record_bytes, self._experts, strict=True)]
        self._first = list(accumulate(spans, initial=0))
        self.bytes = self._first.pop()
        if self.bytes > available:
            raise ResourceError(
                f"the host's memory does not hold all experts: {self.bytes} bytes, and {available} are available; "
                f"give a host budget, and the others are read from disk"
            )
        self._slab = Slab(1, self.bytes, whole_bytes=self.bytes)
        self._whole = torch.frombuffer(self._slab.whole, dtype=torch.uint8, count=self.bytes)
        self._device = device
        self._pinned: list[int] = []
        self.fallback: str | None = None
        """Why the device cannot read records in place; None when it can."""

    def fill(self, records: RecordReader, threads: int, report: Callable[[float], None]) -> None:
        """Read every record, then pin. `report` is told how much is done, 0 to 1. Raises OSError or StoreError.

        A record that several experts share in the store is read once.
        """
        read: dict[int, ExpertId] = {}
        shared: list[tuple[ExpertId, ExpertId]] = []
        for expert in self._all():
            first = read.setdefault(self._offset(expert), expert)
            if first != expert:
                shared.append((expert, first))
        done, total = 0, len(read) + len(shared)
        with ThreadPoolExecutor(threads, "fill") as pool:
            for _ in pool.map(lambda expert: records.read_record(expert, self._view(expert)), read.values()):
                done += 1
                report(done / total)
            for _ in pool.map(lambda pair: self.record(pair[0]).copy_(self.record(pair[1])), shared):
                done += 1
                report(done / total)
        self._pin()

    @property
    def address(self) -> int:
        """Of the first record."""
        return self._slab.address

    @property
    def pinned(self) -> bool:
        """Whether the device reads records in place."""
        return self.fallback is None and bool(self._pinned)

    def home(self, expert: ExpertId) -> int:
        """The address of a record, with what says that it is read over the link, if it is."""
        address = self._slab.address + self._start(expert)
        return address if self._device.shares_memory else address | HOME

    def begin_step(self) -> None:
        """A step begins."""

    def end_step(self) -> None:
        """The step has ended."""

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """`(place in experts, address of the record)`, all of them."""
        yield [(place, self.home(ExpertId(layer, expert)) & ~HOME) for place, expert in enumerate(experts)]

    def record(self, expert: ExpertId) -> Tensor:
        """uint8, the record's bytes."""
        start = self._start(expert)
        return self._whole[start : start + self._record_bytes[expert.layer]]

    def close(self) -> None:
        """Unpin. No launch or copy may be under way."""
        while self._pinned:
            self._device.unregister(self._pinned.pop())

    def _pin(self) -> None:
        for start, length in self._pieces():
            reason = self._device.register(self._slab.address + start, length)
            if reason is not None:
                self.fallback = f"the system does not pin {self.bytes} bytes of host memory: {reason}"
                logger.warning("%s; every missing expert is copied before it is used, a layer at a time", self.fallback)
                self.close()
                return
            self._pinned.append(self._slab.address + start)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        for first, nbytes, experts in zip(self._first, self._record_bytes, self._experts, strict=True):
            step = max(1, _PIECE_BYTES // nbytes)
            for begin in range(0, experts, step):
                yield first + begin * nbytes, min(step, experts - begin) * nbytes

    def _all(self) -> Iterator[ExpertId]:
        for layer, count in enumerate(self._experts):
            for expert in range(count):
                yield ExpertId(layer, expert)

    def _offset(self, expert: ExpertId) -> int:
        return self._offsets[expert.layer] + expert.expert * self._record_bytes[expert.layer]

    def _start(self, expert: ExpertId) -> int:
        return self._first[expert.layer] + expert.expert * self._record_bytes[expert.layer]

    def _view(self, expert: ExpertId) -> memoryview:
        start = self._start(expert)
        return self._slab.whole[start : start + self._record_bytes[expert.layer]]
