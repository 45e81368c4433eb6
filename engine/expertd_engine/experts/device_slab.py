"""Slots in a device's memory: chunks, each its own allocation, so that a lowered budget gives memory back.

Owner: the engine thread. Slots of a chunk that is freed must be no one's.
"""

from __future__ import annotations

from torch import Tensor

from expertd_engine.errors import ResourceError
from expertd_engine.experts.device_pool import ChunkPlan
from expertd_engine.experts.device_streams import Device

CHUNK_BYTES = 256 * 2**20
_SMALLEST_BYTES = 16 * 2**20
"""Less is not an allocation of its own for torch's allocator."""
GRANULE = 2 * 2**20
"""What torch's allocator rounds large blocks to."""


def plan_chunks(slot_bytes: int, most_slots: int, granule: int = GRANULE) -> ChunkPlan:
    """Chunks of `CHUNK_BYTES`, or a sixteenth of all slots if that is less: a change of budget empties up to one."""
    whole, few = CHUNK_BYTES // slot_bytes, max(_SMALLEST_BYTES // slot_bytes, most_slots // 16)
    return ChunkPlan(slot_bytes, max(1, min(most_slots, whole, few)), granule)


class DeviceSlab:
    """No slots at first."""

    def __init__(self, plan: ChunkPlan, device: Device) -> None:
        self._plan = plan
        self._device = device
        self._chunks: list[tuple[int, Tensor]] = []
        """Number of slots, memory."""
        self.slots = 0
        self._places: list[tuple[Tensor, int]] = []
        self._addresses: list[int] = []

    @property
    def bytes(self) -> int:
        """Memory allotted."""
        return sum(memory.numel() for _, memory in self._chunks)

    def kept(self, slots: int) -> int:
        """How many of the first slots stay where they are when there are to be `slots`. A short chunk is replaced."""
        first = 0
        for count, _ in self._chunks:
            whole = count == self._plan.chunk_slots or first + count == slots
            if first + count > slots or not whole:
                break
            first += count
        return first

    def resize(self, slots: int) -> None:
        """Free what is not `kept` and allot the rest. Raises ResourceError, and then what is kept is all there is."""
        kept = self.kept(slots)
        self._free_from(kept)
        try:
            while self.slots < slots:
                self._grow(min(self._plan.chunk_slots, slots - self.slots))
        except ResourceError:
            self._free_from(kept)
            raise

    def address(self, slot: int) -> int:
        return self._addresses[slot]

    def view(self, slot: int, num_bytes: int) -> Tensor:
        """The first `num_bytes` bytes of a slot."""
        memory, start = self._places[slot]
        return memory[start : start + num_bytes]

    def _free_from(self, slots: int) -> None:
        while self.slots > slots:
            self.slots -= self._chunks.pop()[0]
            del self._places[self.slots :], self._addresses[self.slots :]
        self._device.give_back()

    def _grow(self, count: int) -> None:
        memory = self._device.allot(self._plan.bytes_of(count))
        self._chunks.append((count, memory))
        starts = [index * self._plan.slot_bytes for index in range(count)]
        self._places += [(memory, start) for start in starts]
        self._addresses += [memory.data_ptr() + start for start in starts]
        self.slots += count
