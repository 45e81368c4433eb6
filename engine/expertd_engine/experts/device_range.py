"""Addresses on a device, reserved once, with memory behind pieces of them that can be given back and taken again.

What a captured graph reads must never move, and yet a lowered budget must return memory: so addresses outlive memory.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch
from torch import Tensor

from expertd_engine.errors import ResourceError
from expertd_engine.experts.slab import PAGE, Slab


class Range(Protocol):
    """Addresses, all of them with memory at first."""

    whole: Tensor
    """uint8; where there is no memory nobody may read or write."""
    granule: int
    """Pieces are so many bytes."""
    fallback: str | None
    """Why memory is never given back; None where it is."""

    def release(self, piece: int) -> None:
        """Return its memory to the system. No launched work may reach it."""
        ...

    def back(self, piece: int) -> None:
        """Have memory there again, of zeros. Raises ResourceError."""
        ...

    def free(self) -> None:
        """Give up addresses and memory."""
        ...


class HostRange:
    """Of the processor's memory."""

    granule = PAGE
    fallback: str | None = None

    def __init__(self, num_bytes: int) -> None:
        self._slab = Slab(-(-num_bytes // PAGE), PAGE)
        self.whole = torch.frombuffer(self._slab.whole, dtype=torch.uint8)

    def release(self, piece: int) -> None:
        """See `Range`."""
        self._slab.drop(piece)

    def back(self, piece: int) -> None:
        """Pages come when they are touched."""

    def free(self) -> None:
        """It goes with who holds it last."""


class FixedRange:
    """Memory that stays, where the driver does not let addresses outlive it."""

    def __init__(self, num_bytes: int, device: torch.device, fallback: str) -> None:
        self.whole = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.granule = max(1, num_bytes)
        self.fallback: str | None = fallback

    def release(self, piece: int) -> None:
        """See `fallback`."""

    def back(self, piece: int) -> None:
        """It never went."""

    def free(self) -> None:
        """It goes with who holds it last."""


class DriverRefused(Exception):
    """The driver has no such addresses or memory; the text says which call failed, and how."""


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", _Location), ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]  # fmt: skip


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3
"""CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE."""


class CudaAddresses:
    """The driver's virtual memory calls for one card, whose context is current; `driver` is libcuda."""

    def __init__(self, driver: Any, ordinal: int) -> None:
        """Raises DriverRefused."""
        self._driver = driver
        place = _Location(_ON_DEVICE, ordinal)
        self._properties = _Properties(_PINNED, 0, place, None)
        self._access = _Access(place, _READ_WRITE)
        granule = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(granule), ctypes.byref(self._properties), 0)
        self.granule = int(granule.value)

    def reserve(self, num_bytes: int) -> int:
        """The first of so many addresses, a multiple of the granule. Raises DriverRefused."""
        address = ctypes.c_uint64()
        size, zero = ctypes.c_size_t(num_bytes), ctypes.c_size_t(0)
        self._call("cuMemAddressReserve", ctypes.byref(address), size, zero, ctypes.c_uint64(0), ctypes.c_uint64(0))
        return int(address.value)

    def map(self, address: int) -> None:
        """Put a granule of memory there. Raises DriverRefused, and then there is none."""
        size, handle, at = ctypes.c_size_t(self.granule), ctypes.c_uint64(), ctypes.c_uint64(address)
        self._call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), ctypes.c_uint64(0))
        try:
            self._call("cuMemMap", at, size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
        finally:
            self._call("cuMemRelease", handle)  # the mapping alone holds it from here on
        try:
            self._call("cuMemSetAccess", at, size, ctypes.byref(self._access), ctypes.c_size_t(1))
        except DriverRefused:
            self.unmap(address)
            raise

    def unmap(self, address: int) -> None:
        """Take the granule of memory there away. Raises DriverRefused."""
        self._call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(self.granule))

    def free(self, address: int, num_bytes: int) -> None:
        """Undo `reserve`; nothing is mapped there."""
        self._call("cuMemAddressFree", ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))

    def _call(self, name: str, *arguments: Any) -> None:
        if (outcome := int(getattr(self._driver, name)(*arguments))) != 0:
            raise DriverRefused(f"{name}: error {outcome}")


class CudaRange:
    """Of a card's memory. Raises DriverRefused, and nothing is left behind."""

    fallback: str | None = None

    def __init__(self, addresses: CudaAddresses, num_bytes: int, device: torch.device) -> None:
        self._addresses, self.granule, self._device = addresses, addresses.granule, device
        self._bytes = -(-num_bytes // self.granule) * self.granule
        self._first = addresses.reserve(self._bytes)
        self._mapped: set[int] = set()
        try:
            for piece in range(self._bytes // self.granule):
                self._map(piece)
            self.whole: Tensor = torch.as_tensor(_Described(self._first, self._bytes), device=device).zero_()
        except (DriverRefused, RuntimeError) as error:
            self.free()
            raise DriverRefused(str(error)) from error

    def release(self, piece: int) -> None:
        """See `Range`."""
        torch.cuda.synchronize(self._device)
        self._unmap(piece)

    def back(self, piece: int) -> None:
        """See `Range`."""
        try:
            self._map(piece)
        except DriverRefused as error:
            problem = f"{self.granule} bytes of keys and values: {error}"
            raise ResourceError(f"{self._device} has no room for {problem}") from error
        self.whole[piece * self.granule : (piece + 1) * self.granule].zero_()

    def free(self) -> None:
        """See `Range`."""
        torch.cuda.synchronize(self._device)
        for piece in list(self._mapped):
            self._unmap(piece)
        self._addresses.free(self._first, self._bytes)

    def _map(self, piece: int) -> None:
        self._addresses.map(self._first + piece * self.granule)
        self._mapped.add(piece)

    def _unmap(self, piece: int) -> None:
        self._addresses.unmap(self._first + piece * self.granule)
        self._mapped.discard(piece)


class _Described:
    """Bytes at an address, as numba's array interface has them."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 2,
        }  # fmt: skip
