"""A device whose lanes do nothing until they are told to, piece by piece, and a step that reads what it was told to.

Copies are made in two halves, and a step finds out where an expert lies some time before it reads it there: a slot that
is written too soon is seen half written, or to hold another record.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from expertd_engine.errors import ResourceError
from expertd_engine.experts.device_events import COMPUTED, HIT, LANDED, READ, SHARED, WAITED
from expertd_engine.experts.device_layout import HOME
from expertd_engine.experts.device_range import HostRange, Range
from expertd_engine.experts.device_streams import AddressMove, Lane, Mark
from expertd_engine.experts.device_table import DeviceTable
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.store_format import LayerEntry, RecordLayout, StoreIndex

RECORD = 4096


def _done(work: Callable[[], object]) -> bool:
    work()
    return True


def _move(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


@dataclass
class FakeMark:
    device: FakeDevice
    past: bool = False

    def done(self) -> bool:
        return self.past

    def wait(self) -> None:
        self.device.run_until(self)


class FakeLane:
    """Work in order. A piece of work returns False if it cannot be done yet."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.work: deque[Callable[[], bool]] = deque()

    def give(self, work: Callable[[], object]) -> None:
        self.work.append(partial(_done, work))

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for target, source in pairs:
            middle = len(target) // 2
            for part in (slice(0, middle), slice(middle, len(target))):
                self.give(partial(_move, target[part], source[part]))

    def move(self, moves: Sequence[AddressMove]) -> None:
        for target, source, count in moves:
            if count <= 8:  # a word of the table, which is there as long as the device
                self.give(partial(ctypes.memmove, target, source, count))
                continue
            for begin, end in ((0, count // 2), (count // 2, count)):
                self.give(partial(self.device.write, target + begin, source + begin, end - begin))

    def run(self, work: Callable[[], None]) -> None:
        self.give(work)

    def mark(self) -> Mark:
        mark = FakeMark(self.device)
        self.give(lambda: setattr(mark, "past", True))
        return mark

    def after(self, mark: Mark) -> None:
        self.work.append(mark.done)

    def advance(self) -> bool:
        """Do one piece; False if there is none that can be done."""
        if not self.work or not self.work[0]():
            return False
        self.work.popleft()
        return True


class FakeDevice:
    """`most_bytes`: what can be allotted at once."""

    def __init__(self, most_bytes: int = 2**30) -> None:
        self.torch_device = torch.device("cpu")
        self.compute: Lane
        self.copies: Lane
        self.compute, self.copies = self.lanes = FakeLane(self), FakeLane(self)
        self.shares_memory = False
        self.most_bytes = most_bytes
        self.allotted: list[Callable[[], Tensor | None]] = []
        self.unpinnable: str | None = None
        self.registered: dict[int, int] = {}

    def run_until(self, mark: FakeMark) -> None:
        while not mark.past:
            progress = [lane.advance() for lane in self.lanes]
            assert any(progress), "deadlock: neither lane can go on"

    def allot(self, num_bytes: int) -> Tensor:
        if self.bytes_allotted() + num_bytes > self.most_bytes:
            raise ResourceError(f"no room for {num_bytes} bytes")
        memory = torch.full((num_bytes,), 255, dtype=torch.uint8)
        self.allotted.append(weakref.ref(memory))
        return memory

    def reserve(self, num_bytes: int) -> Range:
        return HostRange(num_bytes)

    def bytes_allotted(self) -> int:
        """Of memory that somebody still holds: what one sees from outside."""
        return sum(len(memory) for ref in self.allotted if (memory := ref()) is not None)

    def write(self, target: int, source: int | bytes, count: int) -> None:
        """What a broken cache writes elsewhere would come to light anywhere, or never."""
        held = [memory for ref in self.allotted if (memory := ref()) is not None]
        inside = any(m.data_ptr() <= target and target + count <= m.data_ptr() + len(m) for m in held)
        assert inside, "law 1: a write into memory that is not the cache's, or no longer"
        ctypes.memmove(target, source, count)

    def give_back(self) -> None:
        return None

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype)

    def register(self, address: int, num_bytes: int) -> str | None:
        if self.unpinnable is None:
            self.registered[address] = num_bytes
        return self.unpinnable

    def unregister(self, address: int) -> None:
        del self.registered[address]


def index_of(layers: int, experts: int, top_k: int, record: int = RECORD) -> StoreIndex:
    """Of a store whose records are `record` bytes long."""
    entries = [LayerEntry(f"layers.{i}", experts, 0, i * experts * record, [0] * experts) for i in range(layers)]
    return StoreIndex(
        format_version=2, store_id="", name="", source="", model_type="", architecture="", dense_dtype="float32",
        dense_format="float32", experts_format="float32", top_k=top_k, layouts=[RecordLayout("float32", record, [])],
        layers=entries, router_kind=None, quantised={}, files={}, created_by="",
    )  # fmt: skip


def content(expert: ExpertId) -> bytes:
    """What a record holds: no two halves alike."""
    name = bytes([expert.layer + 1, expert.expert + 1])
    return name * (RECORD // 4) + name[::-1] * (RECORD // 4)


class Records:
    """A store's records."""

    def __init__(self) -> None:
        self.reads = 0

    def place_of(self, expert: ExpertId) -> None:
        """Each is read by itself."""

    def read_record(self, expert: ExpertId, buffer: memoryview) -> None:
        self.reads += 1
        buffer[:] = content(expert)


@dataclass
class FakeStep:
    """One launch: layer after layer finds out where its experts lie, reads them, lands what it may, and reports.

    `left`: of n missing experts of a layer, how many are left to the processor, and whether it computes a part of one
    more. `fails_after`: layers after which it stops, half way through the next one's landings.
    """

    table: DeviceTable
    routes: Sequence[dict[int, int]]
    left: Callable[[int], tuple[int, bool]] = lambda missing: (0, False)
    fails_after: int | None = None
    met: list[tuple[int, int]] = field(default_factory=list)
    _found: list[tuple[ExpertId, int, int]] = field(default_factory=list)
    _landed: list[tuple[ExpertId, int]] = field(default_factory=list)
    _write: Callable[[int, bytes, int], object] = ctypes.memmove

    def give(self, lane: FakeLane) -> None:
        self._write = lane.device.write
        lane.run(self.table.apply)
        for layer, chosen in enumerate(self.routes):
            if self.fails_after is not None and layer > self.fails_after:
                return
            lane.run(partial(self._resolve, layer, chosen))
            if layer == self.fails_after:
                return
            lane.work.append(self._read)
        lane.run(self._publish)

    def run(self) -> None:
        """All of it now, for a device whose lanes are never behind."""
        self.table.apply()
        for layer, chosen in enumerate(self.routes):
            self._resolve(layer, chosen)
            assert self._read()
        self._publish()

    def _resolve(self, layer: int, chosen: dict[int, int]) -> None:
        table = self.table
        self._publish()
        entries = table.entries[layer].tolist()
        missing = [expert for expert in sorted(chosen) if entries[expert][0] & HOME and not entries[expert][1]]
        whole, shares = self.left(len(missing))
        computed, shared = missing[:whole], missing[whole : whole + shares]
        for row, (expert, pairs) in enumerate(sorted(chosen.items())):
            address, flag = table.entries[layer, expert].tolist()
            source, slot = HIT, -1
            if flag:
                slot = flag - 1
                source = HIT if table.ready[slot] else WAITED
                address = int(table.slot_address[slot])
            elif expert in computed:
                source = COMPUTED
            elif expert in shared:
                source = SHARED
            elif address & HOME:
                source = READ
                if (free := int(table.tail) - int(table.head)) > 0:
                    source, slot = LANDED, int(table.landing[int(table.head) % len(table.landing)])
                    table.head += 1
                    self._landed.append((ExpertId(layer, expert), slot))
                assert free >= 0
            self._found.append((ExpertId(layer, expert), address, slot if flag or source == LANDED else -1))
            table.seen[layer, row] = torch.tensor([expert, source, slot if source == LANDED else -1, pairs])
            self.met.append((layer, source))
        table.seen_count[layer] = len(chosen)
        table.progress[0] = int(table.launch) + layer + 1

    def _read(self) -> bool:
        """Wait for what is being copied, then read all, and write what lands."""
        landing = dict(self._landed)
        waits = [slot for expert, _, slot in self._found if slot >= 0 and expert not in landing]
        if any(not self.table.ready[slot] for slot in waits):
            return False
        for expert, address, _ in self._found:
            found = ctypes.string_at(address & ~HOME, RECORD)
            assert found == content(expert), f"two phases: {expert} was read where something else is being written"
            if expert in landing:
                self._write(int(self.table.slot_address[landing[expert]]), found, RECORD)
        self._found.clear()
        return True

    def _publish(self) -> None:
        for expert, slot in self._landed:
            self.table.entries[expert.layer, expert.expert, 0] = self.table.slot_address[slot]
        self._landed.clear()
