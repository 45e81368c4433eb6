"""The seam to the device: two lanes of work in order, memory, pinning. Thin; knows nothing of experts.

What is given to one lane runs in the order in which it was given; between lanes there is only `after`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from expertd_engine.errors import ResourceError
from expertd_engine.experts.device_range import CudaAddresses, CudaRange, DriverRefused, FixedRange, HostRange, Range

AddressMove = tuple[int, int, int]
"""Target address, source address, bytes."""


class Mark(Protocol):
    """A point in a lane's work."""

    def done(self) -> bool:
        """Whether the lane has come past it."""
        ...

    def wait(self) -> None:
        """Until the lane has come past it."""
        ...


class Lane(Protocol):
    """Work on the device that runs in order."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy the second of each pair of equally long tensors into the first, in order, without waiting.

        Host tensors must be pinned, or this waits for the lane.
        """
        ...

    def move(self, moves: Sequence[AddressMove]) -> None:
        """Copy between addresses, in order, without waiting. Host memory must be pinned."""
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Give the lane what `work` launches."""
        ...

    def mark(self) -> Mark:
        """After all that was given so far."""
        ...

    def after(self, mark: Mark) -> None:
        """What is given from now on begins when the other lane has come past its mark."""
        ...


class Device(Protocol):
    """Memory that compute reads, and the host's memory as it sees it."""

    torch_device: torch.device
    compute: Lane
    copies: Lane
    shares_memory: bool
    """Host and device memory are the same: a record at home is as good as one in a slot."""

    def allot(self, num_bytes: int) -> Tensor:
        """uint8, not initialised. Raises ResourceError."""
        ...

    def reserve(self, num_bytes: int) -> Range:
        """Addresses for so many bytes, zeros. Raises ResourceError."""
        ...

    def give_back(self) -> None:
        """Return to the system what was allotted and is no longer referred to."""
        ...

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """Zeros in host memory that the device can read and write at the same address. Raises ResourceError."""
        ...

    def register(self, address: int, num_bytes: int) -> str | None:
        """Pin host memory of ours, so that the device can read it in place; the reason if that cannot be."""
        ...

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        ...


class _Past:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


class _AtOnce:
    """A lane whose work is done when it is given."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for target, source in pairs:
            target.copy_(source)

    def move(self, moves: Sequence[AddressMove]) -> None:
        for target, source, count in moves:
            ctypes.memmove(target, source, count)

    def run(self, work: Callable[[], None]) -> None:
        work()

    def mark(self) -> Mark:
        return _Past()

    def after(self, mark: Mark) -> None:
        return None


class HostDevice:
    """The processor in a device's place: everything happens at once. For the interpreter and for tests."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.compute: Lane = _AtOnce()
        self.copies: Lane = _AtOnce()
        self.shares_memory = False

    def allot(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def reserve(self, num_bytes: int) -> Range:
        return HostRange(num_bytes)

    def give_back(self) -> None:
        return None

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype)

    def register(self, address: int, num_bytes: int) -> str | None:
        return None

    def unregister(self, address: int) -> None:
        return None


class _Stream:
    """A CUDA stream; None: whichever is current when work is given.

    Bytes are moved through the driver itself: a record takes three moves, and torch's copies take ten times as long to
    be given. The interpreter's lock is kept meanwhile, since giving takes less long than getting that back may.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._own = stream
        self._copy_async = ctypes.PyDLL("libcuda.so.1").cuMemcpyAsync
        self._copy_async.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        with torch.cuda.stream(self._own):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def move(self, moves: Sequence[AddressMove]) -> None:
        stream, copy_async = self._stream().cuda_stream, self._copy_async
        for target, source, count in moves:
            if (outcome := copy_async(target, source, count, stream)) != 0:
                raise RuntimeError(f"cuMemcpyAsync of {count} bytes: error {outcome}")

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._own):
            work()

    def mark(self) -> Mark:
        return _Event(self._stream())

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, _Event)
        self._stream().wait_event(mark.event)

    def _stream(self) -> torch.cuda.Stream:
        return self._own or torch.cuda.current_stream()


class _Event:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class CudaDevice:
    """One CUDA device. Compute is the stream that is current; copies have their own."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self.compute: Lane = _Stream(None)
        self.copies: Lane = _Stream(torch.cuda.Stream(device))
        self.shares_memory = bool(torch.cuda.get_device_properties(device).is_integrated)

    def allot(self, num_bytes: int) -> Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.torch_device)
            problem = f"{num_bytes} bytes of expert slots: {free} of {total} bytes are free"
            raise ResourceError(f"{self.torch_device} has no room for {problem}") from error

    def reserve(self, num_bytes: int) -> Range:
        try:
            addresses = CudaAddresses(ctypes.CDLL("libcuda.so.1"), self.torch_device.index or 0)
            return CudaRange(addresses, num_bytes, self.torch_device)
        except DriverRefused as reason:
            fallback = f"keys and values keep their memory when a budget shrinks: {reason}"
        try:
            return FixedRange(num_bytes, self.torch_device, fallback)
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"{self.torch_device} has no room for {num_bytes} bytes of keys and values") from error

    def give_back(self) -> None:
        torch.cuda.empty_cache()

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        try:
            return torch.zeros(count, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            raise ResourceError(f"the system does not pin {count} items of {dtype}: {error}") from error

    def register(self, address: int, num_bytes: int) -> str | None:
        outcome = torch.cuda.cudart().cudaHostRegister(address, num_bytes, _PORTABLE | _MAPPED)
        return None if int(outcome) == 0 else f"cudaHostRegister of {num_bytes} bytes: error {int(outcome)}"

    def unregister(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)


_PORTABLE, _MAPPED = 1, 2
"""Flags of cudaHostRegister."""
