"""Memory for expert slots: one reserved address range, committed by page as records land and returned on demand.

Owner: the engine thread commits and drops; transfer threads only write into slots that a `Load` gave them.
"""

from __future__ import annotations

import ctypes
import mmap

PAGE = mmap.PAGESIZE
_MAP_NORESERVE = 0x4000  # Linux; not in Python's mmap module before 3.13


class Slab:
    """`num_slots` slots of `slot_bytes` bytes each (a multiple of the page size).

    The mapping is *private* anonymous memory: `MADV_DONTNEED` on a shared one (Python's default) frees nothing. It is
    reserved without commit accounting, since a slab as long as the model would otherwise be refused on a small box,
    and kept off transparent huge pages: one fault in a dropped slot would commit 2 MiB that the ledger never charged.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        if num_slots < 1 or slot_bytes < PAGE or slot_bytes % PAGE:
            raise ValueError(f"{num_slots} slots of {slot_bytes} bytes: need at least one, each a multiple of {PAGE}")
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map = mmap.mmap(-1, num_slots * slot_bytes, flags=flags)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._view = memoryview(self._map)

    @property
    def address(self) -> int:
        """Address of slot 0, in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def whole(self) -> memoryview:
        """All slots as one writable view; keeps the mapping alive."""
        return self._view

    def view(self, slot: int, num_bytes: int) -> memoryview:
        """The first `num_bytes` bytes of a slot, writable, page-aligned."""
        start = slot * self.slot_bytes
        return self._view[start : start + num_bytes]

    def drop(self, slot: int, keep_bytes: int = 0) -> None:
        """Return the slot's pages from `keep_bytes` (a multiple of the page size) on to the system."""
        if keep_bytes < self.slot_bytes:
            start = slot * self.slot_bytes + keep_bytes
            self._map.madvise(mmap.MADV_DONTNEED, start, self.slot_bytes - keep_bytes)
