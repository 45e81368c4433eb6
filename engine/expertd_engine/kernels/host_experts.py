"""The native thread that computes experts for a running GPU step (`kernels/native/expertd_host.h`), in ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int32, c_int64, c_void_p
from typing import Any

from expertd_engine.kernels.library import ExpertLayout, KernelsMissing, Library, record_addresses


class Mailbox(ctypes.Structure):
    """`expertd_mailbox`. Whoever makes one keeps what it points to alive."""

    _fields_ = [
        *((name, c_void_p) for name in ("posted", "done", "head", "experts", "begin", "end", "cuts", "pairs", "x")),
        *((name, c_void_p) for name in ("weights", "sums")),
        *((name, c_int32) for name in ("max_rows", "max_experts", "top_k")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [("layout", ExpertLayout), ("records", c_void_p), ("record_bytes", c_int64), ("experts", c_int32)]


class Counts(ctypes.Structure):
    """`expertd_host_counts`: since the thread was made."""

    requests: int
    experts: int
    bytes: int
    nanoseconds: int
    _fields_ = [(name, c_int64) for name in ("requests", "experts", "bytes", "nanoseconds")]


class HostLayer:
    """One layer's records: `addresses[e]` is where expert e's lies, 0 where it has none."""

    def __init__(self, layout: ExpertLayout, addresses: Sequence[int], record_bytes: int) -> None:
        self.addresses: Any = record_addresses(list(addresses))
        self.struct = _Layer(layout, ctypes.addressof(self.addresses), record_bytes, len(addresses))


class HostThread:
    """`threads` of the processor, of which one watches the mailbox between `begin` and `end`.

    Raises KernelsMissing for a library built of another version, ValueError for what it refuses.
    """

    def __init__(self, library: Library, threads: int, layers: Sequence[HostLayer], mailbox: Mailbox) -> None:
        for name, struct in (("expertd_host_layer_bytes", _Layer), ("expertd_mailbox_bytes", Mailbox)):
            size: Any = getattr(library.handle, name, lambda: None)  # absent from older libraries
            size.restype = c_int64
            if size() != ctypes.sizeof(struct):
                raise KernelsMissing(f"native kernels {library.path} are of another version: install again")
        self._layers, self._host = list(layers), c_void_p()
        bound = [c_int32, POINTER(_Layer), c_int32, POINTER(Mailbox), POINTER(c_void_p)]
        create = library.bind("expertd_host_create", bound)
        self._begin = library.bind("expertd_host_begin", [c_void_p])
        self._end = library.bind("expertd_host_end", [c_void_p, POINTER(Counts)])
        self._look = library.bind("expertd_host_look", [c_void_p, POINTER(Counts)])
        self._destroy = library.bind("expertd_host_destroy", [c_void_p])
        given = (_Layer * len(layers))(*(layer.struct for layer in layers))
        create(threads, given, len(layers), byref(mailbox), byref(self._host))

    def begin(self) -> None:
        """From now on requests are answered."""
        self._begin(self._host)

    def end(self) -> Counts:
        """All have been answered: park. Raises ValueError with the reason of the first that failed since the last."""
        counts = Counts()
        self._end(self._host, byref(counts))
        return counts

    def look(self) -> Counts:
        """As `end`, but go on: what comes next may have been asked for already."""
        counts = Counts()
        self._look(self._host, byref(counts))
        return counts

    def close(self) -> None:
        """Ends the threads; again is nothing."""
        if self._host.value is not None:
            self._destroy(self._host)
            self._host = c_void_p()
