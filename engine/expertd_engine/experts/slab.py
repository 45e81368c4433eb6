"""Memory for expert slots: one reserved address range, committed by page as records land and returned on demand.

Owner: the engine thread commits and drops; transfer threads only write into slots that a `Load` gave them.
"""

from __future__ import annotations

import ctypes
import mmap

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 * 2**20
"""Bytes of a transparent huge page on x86-64 and, with 4 KiB pages, on ARM."""
_MAP_NORESERVE = 0x4000  # Linux; not in Python's mmap module before 3.13
_MAPPINGS_MAX = 16_384
"""Each slot with huge pages is two mappings to the kernel, which allows a process 65,530."""


class Slab:
    """`num_slots` slots of `slot_bytes` bytes each (a multiple of the page size).

    The mapping is *private* anonymous memory: `MADV_DONTNEED` on a shared one (Python's default) frees nothing. It is
    reserved without commit accounting, since a slab as long as the model would otherwise be refused on a small box.

    `whole_bytes` is what every slot in use is written of at least. As many huge pages as fit into that are asked for,
    and slots then begin at multiples of one: reading weights is some 7 % faster. Nothing else lies on huge pages: one
    fault beyond a record would commit 2 MiB that the ledger never charged.
    """

    def __init__(self, num_slots: int, slot_bytes: int, *, whole_bytes: int = 0) -> None:
        if num_slots < 1 or slot_bytes < PAGE or slot_bytes % PAGE:
            raise ValueError(f"{num_slots} slots of {slot_bytes} bytes: need at least one, each a multiple of {PAGE}")
        huge = min(whole_bytes, slot_bytes) // HUGE_PAGE * HUGE_PAGE
        if 2 * num_slots > _MAPPINGS_MAX or not hasattr(mmap, "MADV_HUGEPAGE"):
            huge = 0
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.stride = -(-slot_bytes // HUGE_PAGE) * HUGE_PAGE if huge else slot_bytes
        """Bytes from one slot to the next."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map = mmap.mmap(-1, num_slots * self.stride + (HUGE_PAGE if huge else 0), flags=flags)
        self._first = -self._mapped_at() % HUGE_PAGE if huge else 0
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        if huge:
            for slot in range(num_slots):
                self._map.madvise(mmap.MADV_HUGEPAGE, self._first + slot * self.stride, huge)
        self._view = memoryview(self._map)[self._first : self._first + num_slots * self.stride]

    @property
    def address(self) -> int:
        """Address of slot 0, in this process."""
        return self._mapped_at() + self._first

    @property
    def whole(self) -> memoryview:
        """All slots as one writable view; keeps the mapping alive."""
        return self._view

    def view(self, slot: int, num_bytes: int) -> memoryview:
        """The first `num_bytes` bytes of a slot, writable, page-aligned."""
        start = slot * self.stride
        return self._view[start : start + num_bytes]

    def drop(self, slot: int, keep_bytes: int = 0) -> None:
        """Return the slot's pages from `keep_bytes` (a multiple of the page size) on to the system."""
        if keep_bytes < self.slot_bytes:
            start = self._first + slot * self.stride + keep_bytes
            self._map.madvise(mmap.MADV_DONTNEED, start, self.slot_bytes - keep_bytes)

    def _mapped_at(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))
