"""Reads asked of the kernel many at a time (Linux AIO): one call begins them all. Owns the kernel's context for them.

Sixteen direct reads of 108 KiB one after another cost a thread 36 microseconds of a core each, most of it in going to
sleep and waking up; begun together they cost 14. Files should be open with O_DIRECT: others are read before `begin`
returns. Layouts and numbers of calls: linux/aio_abi.h and the kernel's tables of system calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_long, c_ulong, c_void_p

_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Of io_setup, io_destroy, io_getevents and io_submit, by machine."""
_REQUEST = struct.Struct("<QIiHhIQQqQII")
"""`struct iocb`: data, key, rw_flags; opcode, priority, file; address, bytes, offset; reserved, flags, resfd."""
_EVENT = struct.Struct("<QQqq")
"""`struct io_event`: data, request, result, and another."""
_READ = 0


class AsyncReads:
    """Up to `most` reads at once, for one thread. Raises OSError where the kernel has none to give."""

    def __init__(self, most: int) -> None:
        if platform.machine() not in _NUMBERS:
            raise OSError(errno.ENOSYS, f"the calls' numbers on {platform.machine()} are not known")
        setup, self._destroy, self._getevents, self._submit = _NUMBERS[platform.machine()]
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = c_long
        self.most = most
        self._under_way = 0
        self._requests = (c_char * (_REQUEST.size * most))()
        self._events = (c_char * (_EVENT.size * most))()
        first = ctypes.addressof(self._requests)
        self._pointers = (c_void_p * most)(*(first + i * _REQUEST.size for i in range(most)))
        self._context = c_ulong(0)
        self._checked(self._call(c_long(setup), c_long(most), byref(self._context)))

    @property
    def under_way(self) -> int:
        """Reads that have begun and not been told of."""
        return self._under_way

    def begin(self, reads: Sequence[tuple[int, int, int, int]]) -> int:
        """Begin reads of (file, offset, address, bytes), `most` at most, none under way. Returns how many have begun,
        the first of them: the kernel may take fewer, or raise OSError. Their memory must stay until they have ended."""
        if self._under_way or len(reads) > self.most:
            raise ValueError(f"{len(reads)} reads on top of {self._under_way} are not allowed: {self.most} at once")
        for number, (file, offset, address, nbytes) in enumerate(reads):
            where = number * _REQUEST.size
            _REQUEST.pack_into(self._requests, where, number, 0, 0, _READ, 0, file, address, nbytes, offset, 0, 0, 0)
        self._under_way = self._checked(
            self._call(c_long(self._submit), self._context, c_long(len(reads)), self._pointers)
        )
        return self._under_way

    def wait(self, least: int) -> list[tuple[int, int]]:
        """Of the reads under way, at least so many that have ended: (which, its bytes or a negative errno)."""
        arguments = c_long(min(least, self._under_way)), c_long(self.most), self._events, POINTER(c_long)()
        while True:
            try:
                count = self._checked(self._call(c_long(self._getevents), self._context, *arguments))
                break
            except InterruptedError:
                continue
        self._under_way -= count
        ended = (_EVENT.unpack_from(self._events, number * _EVENT.size) for number in range(count))
        return [(number, result) for number, _, result, _ in ended]

    def close(self) -> None:
        """Waits for what is under way; again is nothing."""
        if self._context.value:
            self._call(c_long(self._destroy), self._context)
            self._context = c_ulong(0)

    def _checked(self, result: int) -> int:
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result
