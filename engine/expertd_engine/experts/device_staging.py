"""Streams a layer's absent experts through a few lent slots while the layers compute, in order, without ever waiting.

Owner: the engine thread. The host runs ahead of the device: it gives both lanes their work, and marks make each chunk's
compute wait for its copies and each copy wait for the compute that read its slots last. Who is resident stays so: a
prompt goes through most experts once, and would flush what decoding works with (law 5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertd_engine.experts.device_streams import Mark
from expertd_engine.experts.events import ExpertId

if TYPE_CHECKING:
    from expertd_engine.experts.device_cache import DeviceCache

_CHUNK_BYTES = 64 * 2**20
_CHUNK_MOST = 16
_CHUNKS = 3
"""One that computes, one that is copied, and one that the copies go on to meanwhile."""
_SHARE = 8
"""At most an eighth of the slots are lent, but two at least."""


@dataclass(frozen=True, slots=True)
class Ring:
    """`chunks` chunks of `experts` experts each."""

    chunks: int
    experts: int

    @property
    def slots(self) -> int:
        return self.chunks * self.experts


def plan_ring(slots: int, record_bytes: int) -> Ring:
    """How many of `slots` to stream experts of `record_bytes` through, and how many at once."""
    room = max(2, slots // _SHARE)
    chunks = min(_CHUNKS, room)
    return Ring(chunks, max(1, min(room // chunks, _CHUNK_MOST, _CHUNK_BYTES // record_bytes)))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Experts of one layer that compute may read until the next chunk is asked for; residents, until the step ends."""

    indices: Sequence[int]
    experts: Tensor
    """int32 `[n]`, on the device: `indices`."""
    addresses: Tensor
    """int64 `[n]`, on the device."""

    @property
    def count(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, slots=True)
class _Part:
    """A chunk to be: experts and their slots, -1 for one that is read at home."""

    layer: int
    indices: list[int]
    slots: Sequence[int]
    streamed: bool


@dataclass(slots=True)
class _Streamed:
    layer: int
    chunk: Chunk
    slots: Sequence[int]
    copied: Mark | None = None


class Staging:
    """One step's experts. Chunks must be taken layer by layer, each layer's in order and all of them."""

    def __init__(self, cache: DeviceCache, lent: Sequence[int], ring: Ring) -> None:
        self._cache = cache
        self._lent = lent
        self._size = max(1, min(ring.experts, len(lent) // 2))
        self._places = range(len(lent) // self._size)
        """Chunks that the ring has room for."""
        self._given = 0
        self._waiting: deque[_Streamed] = deque()
        self._streamed: dict[int, list[_Streamed]] = {}
        self._residents: dict[int, Chunk] = {}

    def __enter__(self) -> Staging:
        """The layers' experts are those of this moment: nothing is evicted or comes in until the step has ended."""
        counts = self._cache.ledger.experts_per_layer
        parts = [self._split(layer, range(count)) for layer, count in enumerate(counts)]
        self._describe(enumerate(parts))
        for _ in self._places:
            self._copy_next()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The slots may be copied into after whatever was launched."""
        self._cache.copies.after(self._cache.device.compute.mark())
        self._cache.ledger.take_back(self._lent)

    def resident(self, layer: int) -> Chunk:
        """The experts of a layer that need not be copied."""
        return self._residents[layer]

    def chunks(self, layer: int, counts: Tensor) -> Iterator[Chunk]:
        """The others. What is given to the compute lane until the next is asked for may read the chunk.

        `counts` `[experts]`, on the device: pairs that chose each expert. Here nobody waits for it.
        """
        for streamed in self._streamed.pop(layer, []):
            assert streamed.copied is not None, "chunks are taken out of order"
            self._cache.device.compute.after(streamed.copied)
            yield streamed.chunk
            self._cache.copies.after(self._cache.device.compute.mark())
            self._copy_next()

    def _split(self, layer: int, experts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Those that lie where compute reads them, and the others."""
        if self._cache.device.shares_memory:
            return list(experts), []
        slots = self._cache.ledger.resident_slots(layer)
        return [e for e in experts if slots[e] >= 0], [e for e in experts if slots[e] < 0]

    def _describe(self, layers: Iterable[tuple[int, tuple[list[int], list[int]]]]) -> None:
        """Make all chunks, whose numbers go to the device in one copy."""
        parts: list[_Part] = []
        for layer, (residents, absent) in layers:
            parts.append(
                _Part(layer, residents, [self._cache.ledger.resident_slots(layer)[e] for e in residents], False)
            )
            for begin in range(0, len(absent), self._size):
                indices = absent[begin : begin + self._size]
                first = self._given % len(self._places) * self._size
                self._given += 1
                parts.append(_Part(layer, indices, self._lent[first : first + len(indices)], True))
        experts, addresses = self._numbers(parts)
        start = 0
        for part in parts:
            stop = start + len(part.indices)
            chunk = Chunk(part.indices, experts[start:stop], addresses[start:stop])
            start = stop
            if part.streamed:
                self._streamed.setdefault(part.layer, []).append(_Streamed(part.layer, chunk, part.slots))
            else:
                self._residents[part.layer] = chunk
        self._waiting.extend(chunk for chunks in self._streamed.values() for chunk in chunks)

    def _numbers(self, parts: Sequence[_Part]) -> tuple[Tensor, Tensor]:
        """Experts and addresses of all parts in a row, on the device."""
        cache = self._cache
        experts = torch.tensor([e for part in parts for e in part.indices], dtype=torch.int32)
        addresses = torch.tensor(
            [
                cache.slab.address(slot) if slot >= 0 else cache.host.home(ExpertId(part.layer, expert))
                for part in parts
                for expert, slot in zip(part.indices, part.slots, strict=True)
            ],
            dtype=torch.int64,
        )
        where = cache.device.torch_device
        return experts.to(where), addresses.to(where)

    def _copy_next(self) -> None:
        """Copy the next chunk into its place in the ring, which is the one that has been free for longest."""
        if self._waiting:
            streamed = self._waiting.popleft()
            streamed.copied = self._copy(streamed.layer, streamed.chunk.indices, streamed.slots)

    def _copy(self, layer: int, indices: Sequence[int], slots: Sequence[int]) -> Mark:
        """Bring experts of a layer into slots."""
        cache = self._cache
        nbytes, copies = cache.record_bytes[layer], cache.device.copies
        for some in cache.host.fetch(layer, indices):
            copies.move([(cache.slab.address(slots[place]), address, nbytes) for place, address in some])
            if not cache.host.complete:
                copies.mark().wait()  # the host needs the room for the next
        cache.count_staged(len(indices) * nbytes)
        return copies.mark()


class Residents(Staging):
    """For steps whose rows go to experts that are there, whatever their routers chose: nothing is streamed."""

    def __enter__(self) -> Residents:
        counts = self._cache.ledger.experts_per_layer
        self._describe((layer, (self._split(layer, range(count))[0], [])) for layer, count in enumerate(counts))
        return self

    def chunks(self, layer: int, counts: Tensor) -> Iterator[Chunk]:
        """None."""
        return iter(())


class Fetching(Residents):
    """For steps of any length where the device cannot read all experts at home: only what a layer chose is brought in,
    so the host waits once a layer to be told. What comes in by decoding stays, as far as there is room.
    """

    def __init__(self, cache: DeviceCache, lent: Sequence[int], ring: Ring, keep: bool) -> None:
        super().__init__(cache, lent, ring)
        self._keep = keep
        self._ring = deque(lent)

    def __enter__(self) -> Fetching:
        self._cache.host.begin_step()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._cache.host.end_step()

    def chunks(self, layer: int, counts: Tensor) -> Iterator[Chunk]:
        """As there, but of those chosen. Raises ExpertUnavailableError."""
        absent = self._split(layer, counts.nonzero().flatten().tolist())[1]
        self._cache.layer_waits += 1
        device = self._cache.device
        for begin in range(0, len(absent), self._size):
            indices = absent[begin : begin + self._size]
            slots = [self._ring.popleft() for _ in indices]
            device.compute.after(self._copy(layer, indices, slots))
            experts, addresses = self._numbers([_Part(layer, indices, slots, True)])
            yield Chunk(indices, experts, addresses)
            device.copies.after(device.compute.mark())
            self._done_with(layer, indices, slots)

    def _done_with(self, layer: int, indices: Sequence[int], slots: Sequence[int]) -> None:
        for index, slot in zip(indices, slots, strict=True):
            if self._keep and len(self._ring) >= self._size:
                self._cache.adopt(ExpertId(layer, index), slot)
            else:
                self._ring.append(slot)
            self._cache.fetched.add((layer, index))
