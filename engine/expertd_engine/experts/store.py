"""Opens and checks an expert store. Owns nothing: its records are a `RecordFile`'s.

Imports no torch: the server's checks run on it. Layout: `store_format`; writer: `prepare`.
"""

from __future__ import annotations

import hashlib
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from expertd_engine.console import Progress, silent
from expertd_engine.errors import StoreError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.record_file import RecordFile
from expertd_engine.experts.soundness import problem_of
from expertd_engine.experts.store_format import (
    DENSE_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    TARGETS,
    FileEntry,
    StoreIndex,
)

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
        return RecordFile(self.path, self.index, direct=direct, verify_always=verify_always)

    def experts(self) -> Iterator[ExpertId]:
        """Every expert, in the order of its record on disk."""
        for layer, entry in enumerate(self.index.layers):
            for expert in range(entry.num_experts):
                yield ExpertId(layer, expert)

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


def _aligned_buffer(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
