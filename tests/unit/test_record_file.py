"""A record is read whole, checked, or refused with its place."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expertd_engine.bench import slow_disk
from expertd_engine.bench.slow_disk import SlowStore
from expertd_engine.errors import StoreError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import ALIGNMENT, RECORDS_NAME
from support.random_store import EXPERTS, LAST, buffer_of, read_record, write_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_every_record_is_read_as_it_was_written(folder: Path) -> None:
    written = write_store(folder)
    store = ExpertStore.open(folder)
    assert list(store.experts()) == list(written)
    with store.open_records() as records, store.open_records(direct=False) as buffered:
        assert {expert: read_record(records, expert) for expert in store.experts()} == written
        assert {expert: read_record(buffered, expert) for expert in store.experts()} == written
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
    written = write_store(folder)
    clock = Clock()
    monkeypatch.setattr(slow_disk, "time", clock)
    store = ExpertStore.open(folder)
    with SlowStore(store.path, store.index, bytes_per_s=2 * ALIGNMENT).open_records() as records:
        assert {expert: read_record(records, expert) for expert in store.experts()} == written
        assert clock.now == 100 + EXPERTS * (0.5 + 1.5)
        clock.now += 50
        read_record(records, LAST)
        assert clock.now == 158 + 1.5, "what was not read while nobody asked is not made up for"


def test_threads_read_at_once(folder: Path) -> None:
    written = write_store(folder)
    store = ExpertStore.open(folder)
    wanted = list(written) * 20
    with store.open_records() as records, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda expert: read_record(records, expert), wanted)) == [
            written[expert] for expert in wanted
        ]


def test_refused_direct_open_falls_back_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = write_store(folder)
    real_open = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    with ExpertStore.open(folder).open_records() as records:
        assert not records.direct and records.fallback_reason
        assert "page cache" in caplog.text
        assert read_record(records, LAST) == written[LAST]


def test_refused_direct_read_falls_back_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = write_store(folder)
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
        assert read_record(records, LAST) == written[LAST]
        assert (before, records.direct) == (True, False) and records.fallback_reason
    assert len(caplog.records) == 1


def test_short_reads_are_continued_where_a_direct_read_may_begin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_store(folder)
    real, offsets = os.preadv, []

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        return real(fd, [buffers[0][:5000]], offset)

    with ExpertStore.open(folder).open_records(direct=False) as records:
        monkeypatch.setattr(os, "preadv", short)
        assert read_record(records, LAST) == written[LAST]
    assert len(offsets) == 3 and all(offset % ALIGNMENT == 0 for offset in offsets)


def test_a_read_error_names_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(folder)

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = ExpertStore.open(folder)
    with store.open_records() as records:
        monkeypatch.setattr(os, "preadv", failing)
        place = rf"layer 1, expert 3\), byte {store.index.record_offset(LAST)}: Input/output error"
        with pytest.raises(StoreError, match=place):
            read_record(records, LAST)


def test_a_file_that_shrinks_later_is_an_error(folder: Path) -> None:
    write_store(folder)
    with ExpertStore.open(folder).open_records() as records:
        os.truncate(folder / RECORDS_NAME, 100)
        with pytest.raises(StoreError, match=r"layer 0, expert 0\), byte 0: the file ends here"):
            read_record(records, ExpertId(0, 0))


def test_wrong_buffers_are_refused(folder: Path) -> None:
    write_store(folder)
    with ExpertStore.open(folder).open_records() as records:
        for buffer in (buffer_of(2 * ALIGNMENT), buffer_of(2 * ALIGNMENT)[64 : 64 + ALIGNMENT]):
            with pytest.raises(ValueError, match="4096 bytes at a multiple of 4096"):
                records.read_record(ExpertId(0, 0), buffer)
