"""Reads the records of an expert store, past the page cache. Owns the descriptor of experts.bin; owns no thread and
no slot.

Imports no torch: transfer threads run on it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
import zlib
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

from expertd_engine.errors import StoreError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.store_format import ALIGNMENT, RECORDS_NAME, StoreIndex

logger = logging.getLogger(__name__)


class RecordFile:
    """experts.bin, open for positional reads from any number of threads.

    A record's checksum is compared the first time it is read; later reads of it trust the disk, unless `verify_always`.
    One that differs is read once more before it is given up: a bus or a cable may have erred, and not the disk.
    """

    def __init__(self, folder: Path, index: StoreIndex, *, direct: bool, verify_always: bool = False) -> None:
        """Of the store in `folder`. Without `direct`, and where the system refuses it, reads go through the page cache.
        Raises StoreError where the file cannot be opened."""
        self._folder = folder
        self._index = index
        self._verify_always = verify_always
        self._path = folder / RECORDS_NAME
        self._lock = threading.Lock()
        self._fds: list[int] = []
        first = list(accumulate((layer.num_experts for layer in index.layers), initial=0))
        self._first_record = first[:-1]
        self._checked = bytearray(first[-1])
        self.direct = False
        self.fallback_reason: str | None = None
        """Why reads go through the page cache although direct ones were asked for; None when they do not."""
        if direct:
            self._open_direct()
        else:
            self._fds.append(self._open(0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; no read may be under way."""
        while self._fds:
            os.close(self._fds.pop())

    def read_record(self, expert: ExpertId, buffer: memoryview) -> None:
        """Fill `buffer`, page-aligned and exactly as long as the record. Raises StoreError naming the place."""
        size = self._index.record_bytes(expert.layer)
        if buffer.nbytes != size or _address(buffer) % ALIGNMENT:
            raise ValueError(f"a buffer for {expert} must hold {size} bytes at a multiple of {ALIGNMENT}")
        ordinal = self._first_record[expert.layer] + expert.expert
        if self._verify_always or not self._checked[ordinal]:
            self._read_checked(expert, buffer.cast("B"))
            self._checked[ordinal] = 1
        else:
            self._read_at(self._index.record_offset(expert), buffer.cast("B"), expert)

    def place_of(self, expert: ExpertId) -> tuple[int, int] | None:
        """File and offset of a record, for who begins many reads at once. None where it has to come by `read_record`:
        its checksum is due, or reads go through the page cache."""
        checked = self._checked[self._first_record[expert.layer] + expert.expert] and not self._verify_always
        return (self._fds[-1], self._index.record_offset(expert)) if checked and self.direct else None

    def verify_record(self, expert: ExpertId, scratch: memoryview) -> None:
        """Read a record through `scratch`, page-aligned and a multiple of `ALIGNMENT` long, and compare its checksum.

        Raises StoreError naming the place; its next read as an expert is then checked again.
        """
        self._checked[self._first_record[expert.layer] + expert.expert] = 0
        self._read_checked(expert, scratch)
        self._checked[self._first_record[expert.layer] + expert.expert] = 1

    def _read_checked(self, expert: ExpertId, buffer: memoryview) -> None:
        """Pass the record through `buffer`, which holds it then if it is as long; at most twice."""
        try:
            self._check_crc32(expert, self._read_crc32(expert, buffer))
        except StoreError as error:
            logger.warning("%s; reading it once more", error)
            self._check_crc32(expert, self._read_crc32(expert, buffer))

    def _read_crc32(self, expert: ExpertId, buffer: memoryview) -> int:
        begin, size, crc32 = self._index.record_offset(expert), self._index.record_bytes(expert.layer), 0
        for offset in range(0, size, len(buffer)):
            piece = buffer[: min(len(buffer), size - offset)]
            self._read_at(begin + offset, piece, expert)
            crc32 = zlib.crc32(piece, crc32)
        return crc32

    def _check_crc32(self, expert: ExpertId, crc32: int) -> None:
        """Raise StoreError if the record, padding included, does not have the checksum that the index states."""
        if crc32 != self._index.layers[expert.layer].crc32[expert.expert]:
            raise StoreError(
                f"store {self._folder}: record (layer {expert.layer}, expert {expert.expert}) of {RECORDS_NAME} is "
                f"corrupted: its checksum differs from the index; prepare the store again"
            )

    def _read_at(self, offset: int, buffer: memoryview, expert: ExpertId) -> None:
        done = 0
        while done < len(buffer):
            direct = self.direct
            try:
                count = os.preadv(self._fds[-1], [buffer[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:  # as it was: another thread may just have fallen back
                    self._fall_back("the file system refuses direct reads of this alignment")
                    continue
                raise self._unreadable(expert, offset + done, error.strerror or str(error)) from error
            # A short direct read may end anywhere, but the next one must begin at a multiple of ALIGNMENT.
            advance = count if done + count == len(buffer) else count - count % ALIGNMENT
            if advance == 0:
                raise self._unreadable(expert, offset + done, "the file ends here")
            done += advance

    def _unreadable(self, expert: ExpertId, offset: int, reason: str) -> StoreError:
        place = f"record (layer {expert.layer}, expert {expert.expert}), byte {offset}"
        return StoreError(f"cannot read {self._path}, {place}: {reason}")

    def _open(self, flags: int) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | flags)
        except OSError as error:
            if error.errno == errno.EINVAL and flags:
                raise
            raise StoreError(f"cannot open {self._path}: {error.strerror}") from error

    def _open_direct(self) -> None:
        try:
            self._fds.append(self._open(os.O_DIRECT))
            self.direct = True
        except OSError:
            self.direct = True
            self._fall_back("the file system refuses O_DIRECT")

    def _fall_back(self, reason: str) -> None:
        """Read through the page cache from now on. Other threads may still be using the old descriptor: keep it."""
        with self._lock:
            if self.direct:
                self._fds.append(self._open(0))
                self.direct, self.fallback_reason = False, reason
                logger.warning("%s: %s; reading through the page cache", self._path, reason)


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
