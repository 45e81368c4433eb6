"""An expert store opens only when it is sound, and a record is read whole, checked, or refused with its place."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from expertd_engine.bench import slow_disk
from expertd_engine.bench.slow_disk import SlowStore
from expertd_engine.errors import StoreError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.store import ExpertStore, RecordFile, describe_file, identify, is_store
from expertd_engine.experts.store_format import (
    ALIGNMENT,
    DENSE_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    RECORDS_NAME,
    LayerEntry,
    RecordLayout,
    StoreIndex,
)

RECORD_BYTES = (ALIGNMENT, 3 * ALIGNMENT)
"""Of the records of each layer."""
EXPERTS = 4
LAST = ExpertId(1, EXPERTS - 1)


def _write_store(folder: Path) -> dict[ExpertId, bytes]:
    """A store of two layers with records of random bytes, and those bytes."""
    folder.mkdir()
    source = random.Random(0)
    experts = [ExpertId(layer, expert) for layer in range(2) for expert in range(EXPERTS)]
    records = {expert: source.randbytes(RECORD_BYTES[expert.layer]) for expert in experts}
    (folder / RECORDS_NAME).write_bytes(b"".join(records.values()))
    (folder / DENSE_NAME).write_bytes(source.randbytes(1000))
    layers = [
        LayerEntry(
            module=f"layers.{layer}.experts",
            num_experts=EXPERTS,
            layout=layer,
            offset=layer * EXPERTS * RECORD_BYTES[0],
            crc32=[zlib.crc32(records[ExpertId(layer, expert)]) for expert in range(EXPERTS)],
        )
        for layer in range(2)
    ]
    index = StoreIndex(
        format_version=FORMAT_VERSION, store_id="", name="tiny", source="made", model_type="mixtral",
        architecture="MixtralForCausalLM", dense_dtype="float32", dense_format="float32", experts_format="float32",
        top_k=2, layouts=[RecordLayout("float32", size, []) for size in RECORD_BYTES], layers=layers, router_kind=None,
        quantised={},
        files={
            DENSE_NAME: describe_file(folder / DENSE_NAME),
            RECORDS_NAME: describe_file(folder / RECORDS_NAME, checksum=False),
        },
        created_by="a test",
    )  # fmt: skip
    _write_index(folder, msgspec.structs.replace(index, store_id=identify(index)))
    return records


def _write_index(folder: Path, index: StoreIndex) -> None:
    (folder / INDEX_NAME).write_bytes(msgspec.json.encode(index))


def _buffer(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _read(records: RecordFile, expert: ExpertId) -> bytes:
    buffer = _buffer(RECORD_BYTES[expert.layer])
    records.read_record(expert, buffer)
    return bytes(buffer)


def _flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_every_record_is_read_as_it_was_written(folder: Path) -> None:
    written = _write_store(folder)
    store = ExpertStore.open(folder)
    assert list(store.experts()) == list(written)
    with store.open_records() as records, store.open_records(direct=False) as buffered:
        assert {expert: _read(records, expert) for expert in store.experts()} == written
        assert {expert: _read(buffered, expert) for expert in store.experts()} == written
        assert not buffered.direct and buffered.fallback_reason is None


class Clock:
    """Sleeping is all that takes time."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_records_come_as_slowly_as_a_slow_disk_brings_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = _write_store(folder)
    clock = Clock()
    monkeypatch.setattr(slow_disk, "time", clock)
    store = ExpertStore.open(folder)
    with SlowStore(store.path, store.index, bytes_per_s=2 * ALIGNMENT).open_records() as records:
        assert {expert: _read(records, expert) for expert in store.experts()} == written
        assert clock.now == 100 + EXPERTS * (0.5 + 1.5)
        clock.now += 50
        _read(records, LAST)
        assert clock.now == 158 + 1.5, "what was not read while nobody asked is not made up for"


def test_threads_read_at_once(folder: Path) -> None:
    written = _write_store(folder)
    store = ExpertStore.open(folder)
    wanted = list(written) * 20
    with store.open_records() as records, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda expert: _read(records, expert), wanted)) == [written[expert] for expert in wanted]


@pytest.mark.parametrize(("name", "kept"), [(RECORDS_NAME, 5000), (DENSE_NAME, 0)])
def test_truncated_file_is_named_with_its_sizes(folder: Path, name: str, kept: int) -> None:
    _write_store(folder)
    expected = (folder / name).stat().st_size
    os.truncate(folder / name, kept)
    with pytest.raises(StoreError, match=rf"{name} is truncated: expected {expected} bytes, found {kept}"):
        ExpertStore.open(folder)


def test_missing_and_overlong_files_are_named(folder: Path) -> None:
    _write_store(folder)
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
    _write_index(folder, msgspec.structs.replace(index, top_k=1))


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
    _write_store(folder)
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
    _write_store(folder)
    seen: list[float] = []
    ExpertStore.open(folder).verify(lambda _, fraction: seen.append(fraction))
    assert seen == sorted(seen) and len(seen) == 2 * EXPERTS and seen[-1] == 1.0


def test_verify_names_the_bad_record(folder: Path) -> None:
    _write_store(folder)
    store = ExpertStore.open(folder)
    _flip_byte(folder / RECORDS_NAME, store.record_offset(ExpertId(1, 2)) + RECORD_BYTES[1] - 1)
    with pytest.raises(StoreError, match=r"record \(layer 1, expert 2\) of experts.bin is corrupted"):
        store.verify()
    with store.open_records() as records:
        _read(records, ExpertId(1, 1))
        with pytest.raises(StoreError, match=r"layer 1, expert 2"):
            _read(records, ExpertId(1, 2))


def test_verify_names_the_bad_file(folder: Path) -> None:
    _write_store(folder)
    _flip_byte(folder / DENSE_NAME, 500)
    with pytest.raises(StoreError, match=rf"file {DENSE_NAME} is corrupted"):
        ExpertStore.open(folder).verify()


def test_refused_direct_open_falls_back_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = _write_store(folder)
    real_open = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    with ExpertStore.open(folder).open_records() as records:
        assert not records.direct and records.fallback_reason
        assert "page cache" in caplog.text
        assert _read(records, LAST) == written[LAST]


def test_refused_direct_read_falls_back_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = _write_store(folder)
    real_open, real_preadv, direct_fds = os.open, os.preadv, set()

    def noting(path: Path, flags: int, mode: int = 0o777) -> int:
        fd = real_open(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:
            direct_fds.add(fd)
        return fd

    def refusing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fd in direct_fds:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "open", noting)
    monkeypatch.setattr(os, "preadv", refusing)
    with ExpertStore.open(folder).open_records() as records:
        before = records.direct
        assert _read(records, LAST) == written[LAST]
        assert (before, records.direct) == (True, False) and records.fallback_reason
    assert len(caplog.records) == 1


def test_short_reads_are_continued_where_a_direct_read_may_begin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = _write_store(folder)
    real, offsets = os.preadv, []

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        return real(fd, [buffers[0][:5000]], offset)

    with ExpertStore.open(folder).open_records(direct=False) as records:
        monkeypatch.setattr(os, "preadv", short)
        assert _read(records, LAST) == written[LAST]
    assert len(offsets) == 3 and all(offset % ALIGNMENT == 0 for offset in offsets)


def test_a_read_error_names_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_store(folder)

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = ExpertStore.open(folder)
    with store.open_records() as records:
        monkeypatch.setattr(os, "preadv", failing)
        place = rf"layer 1, expert 3\), byte {store.record_offset(LAST)}: Input/output error"
        with pytest.raises(StoreError, match=place):
            _read(records, LAST)


def test_a_file_that_shrinks_later_is_an_error(folder: Path) -> None:
    _write_store(folder)
    with ExpertStore.open(folder).open_records() as records:
        os.truncate(folder / RECORDS_NAME, 100)
        with pytest.raises(StoreError, match=r"layer 0, expert 0\), byte 0: the file ends here"):
            _read(records, ExpertId(0, 0))


def test_wrong_buffers_are_refused(folder: Path) -> None:
    _write_store(folder)
    with ExpertStore.open(folder).open_records() as records:
        for buffer in (_buffer(2 * ALIGNMENT), _buffer(2 * ALIGNMENT)[64 : 64 + ALIGNMENT]):
            with pytest.raises(ValueError, match="4096 bytes at a multiple of 4096"):
                records.read_record(ExpertId(0, 0), buffer)


def test_reading_a_store_needs_no_torch() -> None:
    code = "import sys, expertd_engine.experts.store, expertd_engine.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
