"""Opens, checks and reads an expert store. Owns the file descriptor of experts.bin; owns no thread and no slot.

Imports no torch: transfer threads and the server's checks run on it. Layout: `store_format`; writer: `prepare`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import mmap
import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from expertd_engine.console import Progress, silent
from expertd_engine.errors import StoreError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.soundness import problem_of
from expertd_engine.experts.store_format import (
    ALIGNMENT,
    DENSE_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    RECORDS_NAME,
    TARGETS,
    FileEntry,
    StoreIndex,
)

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 * 2**20


class _Version(msgspec.Struct):
    format_version: int
    store_id: str


def identify(index: StoreIndex) -> str:
    """The `store_id` that `index` should carry: sha256 of its JSON with an empty id, in hex."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(index, store_id=""))).hexdigest()


def is_store(path: Path) -> bool:
    """Whether `path` is a folder that claims to be a store; `ExpertStore.open` says whether it is a sound one."""
    return (path / INDEX_NAME).is_file()


@dataclass(frozen=True, slots=True)
class ExpertStore:
    """A store whose index and file sizes are right. Contents are checked by `verify`, or as they are read."""

    path: Path
    index: StoreIndex

    @classmethod
    def open(cls, path: Path) -> ExpertStore:
        """Read the index and check version, identity and file sizes. Raises StoreError naming what is wrong."""
        store = cls(path, _read_index(path))
        for name, entry in store.index.files.items():
            _check_size(path / name, entry.bytes)
        return store

    @property
    def dense_path(self) -> Path:
        return self.path / DENSE_NAME

    def require_order(self, order: str) -> None:
        """Raise StoreError unless records lie in this order (`store_format.TARGETS`): what computes reads no other."""
        targets = {name: target for target, name in TARGETS.items()}
        for found in {layout.order for layout in self.index.layouts} - {order}:
            raise StoreError(
                f"store {self.path} is made for a {targets[found].upper()}, not for a {targets[order].upper()}: "
                f"make one with `expertd prepare --for {targets[order]}`"
            )

    def open_records(self, *, direct: bool = True, verify_always: bool = False) -> RecordFile:
        """The records, read past the page cache unless `direct` is off or the system refuses it."""
        return RecordFile(self, direct=direct, verify_always=verify_always)

    def record_offset(self, expert: ExpertId) -> int:
        """Byte in experts.bin at which the record begins, a multiple of `ALIGNMENT`."""
        return self.index.layers[expert.layer].offset + expert.expert * self.index.record_bytes(expert.layer)

    def experts(self) -> Iterator[ExpertId]:
        """Every expert, in the order of its record on disk."""
        for layer, entry in enumerate(self.index.layers):
            for expert in range(entry.num_experts):
                yield ExpertId(layer, expert)

    def check_record(self, expert: ExpertId, crc32: int) -> None:
        """Raise StoreError if the record, padding included, does not have the checksum that the index states."""
        if crc32 != self.index.layers[expert.layer].crc32[expert.expert]:
            raise StoreError(
                f"store {self.path}: record (layer {expert.layer}, expert {expert.expert}) of {RECORDS_NAME} is "
                f"corrupted: its checksum differs from the index; prepare the store again"
            )

    def verify(self, progress: Progress = silent) -> None:
        """Read everything and compare all checksums. Raises StoreError naming the first bad file or record."""
        for name, entry in self.index.files.items():
            if entry.crc32 is not None and file_crc32(self.path / name) != entry.crc32:
                raise StoreError(f"store {self.path}: file {name} is corrupted: its checksum differs from the index")
        total = self.index.expert_bytes_total()
        done = 0
        with self.open_records() as records:
            for expert in self.experts():
                size = self.index.record_bytes(expert.layer)
                records.read_record(expert, _aligned_buffer(size))
                done += size
                progress("verify", done / total)


class RecordFile:
    """experts.bin, open for positional reads from any number of threads.

    A record's checksum is compared the first time it is read; later reads of it trust the disk, unless `verify_always`.
    One that differs is read once more before it is given up: a bus or a cable may have erred, and not the disk.
    """

    def __init__(self, store: ExpertStore, *, direct: bool, verify_always: bool = False) -> None:
        self._store = store
        self._verify_always = verify_always
        self._path = store.path / RECORDS_NAME
        self._lock = threading.Lock()
        self._fds: list[int] = []
        first = list(accumulate((layer.num_experts for layer in store.index.layers), initial=0))
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
        size = self._store.index.record_bytes(expert.layer)
        if buffer.nbytes != size or _address(buffer) % ALIGNMENT:
            raise ValueError(f"a buffer for {expert} must hold {size} bytes at a multiple of {ALIGNMENT}")
        ordinal = self._first_record[expert.layer] + expert.expert
        if self._verify_always or not self._checked[ordinal]:
            self._read_checked(expert, buffer.cast("B"))
            self._checked[ordinal] = 1
        else:
            self._read_at(self._store.record_offset(expert), buffer.cast("B"), expert)

    def place_of(self, expert: ExpertId) -> tuple[int, int] | None:
        """File and offset of a record, for who begins many reads at once. None where it has to come by `read_record`:
        its checksum is due, or reads go through the page cache."""
        checked = self._checked[self._first_record[expert.layer] + expert.expert] and not self._verify_always
        return (self._fds[-1], self._store.record_offset(expert)) if checked and self.direct else None

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
            self._store.check_record(expert, self._read_crc32(expert, buffer))
        except StoreError as error:
            logger.warning("%s; reading it once more", error)
            self._store.check_record(expert, self._read_crc32(expert, buffer))

    def _read_crc32(self, expert: ExpertId, buffer: memoryview) -> int:
        begin, size, crc32 = self._store.record_offset(expert), self._store.index.record_bytes(expert.layer), 0
        for offset in range(0, size, len(buffer)):
            piece = buffer[: min(len(buffer), size - offset)]
            self._read_at(begin + offset, piece, expert)
            crc32 = zlib.crc32(piece, crc32)
        return crc32

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


def file_crc32(path: Path) -> int:
    """zlib.crc32 of a whole file. Raises StoreError when it cannot be read."""
    checksum = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                checksum = zlib.crc32(chunk, checksum)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    return checksum


def describe_file(path: Path, *, checksum: bool = True) -> FileEntry:
    """The index's entry for a finished file."""
    return FileEntry(bytes=path.stat().st_size, crc32=file_crc32(path) if checksum else None)


def _read_index(path: Path) -> StoreIndex:
    if not path.is_dir():
        raise StoreError(f"no store at {path}: " + ("not a folder" if path.exists() else "no such folder"))
    try:
        data = (path / INDEX_NAME).read_bytes()
    except FileNotFoundError:
        raise StoreError(
            f"{path} is not an expert store: it has no {INDEX_NAME}; make one with `expertd prepare`"
        ) from None
    except OSError as error:
        raise StoreError(f"cannot read {path / INDEX_NAME}: {error.strerror}") from error
    try:
        version = msgspec.json.decode(data, type=_Version)
        if version.format_version == FORMAT_VERSION:
            index = msgspec.json.decode(data, type=StoreIndex)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not an expert store, or its {INDEX_NAME} is damaged: {error}") from error
    if version.format_version != FORMAT_VERSION:
        raise StoreError(
            f"store {path} has format version {version.format_version}; this expertd reads version {FORMAT_VERSION}: "
            f"prepare it again"
        )
    if identify(index) != index.store_id:
        raise StoreError(f"store {path}: {INDEX_NAME} was changed after it was written: its store_id does not match")
    problem = problem_of(index)
    if problem is not None:
        raise StoreError(f"store {path}: {INDEX_NAME} makes no sense: {problem}")
    return index


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise StoreError(f"store file {path} is missing: {error.strerror}") from error
    if found != expected:
        fault = "truncated" if found < expected else "too long"
        raise StoreError(f"store file {path} is {fault}: expected {expected} bytes, found {found}")


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _aligned_buffer(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
