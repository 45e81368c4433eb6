"""An expert store opens only when it is sound, and `verify` names what is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from expertd_engine.errors import StoreError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.store import ExpertStore, is_store
from expertd_engine.experts.store_format import DENSE_NAME, INDEX_NAME, RECORDS_NAME, StoreIndex
from support.random_store import EXPERTS, RECORD_BYTES, read_record, write_index, write_store


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.mark.parametrize(("name", "kept"), [(RECORDS_NAME, 5000), (DENSE_NAME, 0)])
def test_truncated_file_is_named_with_its_sizes(folder: Path, name: str, kept: int) -> None:
    write_store(folder)
    expected = (folder / name).stat().st_size
    os.truncate(folder / name, kept)
    with pytest.raises(StoreError, match=rf"{name} is truncated: expected {expected} bytes, found {kept}"):
        ExpertStore.open(folder)


def test_missing_and_overlong_files_are_named(folder: Path) -> None:
    write_store(folder)
    with (folder / DENSE_NAME).open("ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match=rf"{DENSE_NAME} is too long"):
        ExpertStore.open(folder)
    (folder / DENSE_NAME).unlink()
    with pytest.raises(StoreError, match=rf"{DENSE_NAME} is missing"):
        ExpertStore.open(folder)


def _of_version(folder: Path, version: int) -> None:
    index = msgspec.json.decode((folder / INDEX_NAME).read_bytes())
    # Another version may have other fields: the version must be understood before the rest is.
    (folder / INDEX_NAME).write_bytes(msgspec.json.encode({**index, "format_version": version, "news": 1}))


def _tampered(folder: Path) -> None:
    index = msgspec.json.decode((folder / INDEX_NAME).read_bytes(), type=StoreIndex)
    write_index(folder, msgspec.structs.replace(index, top_k=1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / INDEX_NAME).unlink(), "is not an expert store: it has no store.json"),
        (
            lambda folder: (folder / INDEX_NAME).write_text('{"some": "json"}'),
            "is not an expert store, or its store.json",
        ),
        (lambda folder: (folder / INDEX_NAME).write_bytes(b"\xff\x00"), "is not an expert store, or its store.json"),
        (lambda folder: _of_version(folder, 1), "has format version 1; .* reads version 2: prepare it again"),
        (lambda folder: _of_version(folder, 99), "has format version 99; this expertd reads version 2"),
        (_tampered, "store.json was changed"),
    ],
)
def test_foreign_and_damaged_indexes_are_refused(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    write_store(folder)
    spoil(folder)
    with pytest.raises(StoreError, match=message):
        ExpertStore.open(folder)


def test_what_is_no_folder_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent", tmp_path / "file", tmp_path):
        assert not is_store(path)
        with pytest.raises(StoreError, match=str(path)):
            ExpertStore.open(path)


def test_verify_passes_a_sound_store_and_reports_progress(folder: Path) -> None:
    write_store(folder)
    seen: list[float] = []
    ExpertStore.open(folder).verify(lambda _, fraction: seen.append(fraction))
    assert seen == sorted(seen) and len(seen) == 2 * EXPERTS and seen[-1] == 1.0


def test_verify_names_the_bad_record(folder: Path) -> None:
    write_store(folder)
    store = ExpertStore.open(folder)
    flip_byte(folder / RECORDS_NAME, store.index.record_offset(ExpertId(1, 2)) + RECORD_BYTES[1] - 1)
    with pytest.raises(StoreError, match=r"record \(layer 1, expert 2\) of experts.bin is corrupted"):
        store.verify()
    with store.open_records() as records:
        read_record(records, ExpertId(1, 1))
        with pytest.raises(StoreError, match=r"layer 1, expert 2"):
            read_record(records, ExpertId(1, 2))


def test_verify_names_the_bad_file(folder: Path) -> None:
    write_store(folder)
    flip_byte(folder / DENSE_NAME, 500)
    with pytest.raises(StoreError, match=rf"file {DENSE_NAME} is corrupted"):
        ExpertStore.open(folder).verify()


def test_reading_a_store_needs_no_torch() -> None:
    code = "import sys, expertd_engine.experts.store, expertd_engine.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
