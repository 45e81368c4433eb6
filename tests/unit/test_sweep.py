"""Checksums: compared when a record is first read, always if so asked, and by a sweep; a bad one is read twice."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from expertd_engine.errors import StoreError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.record_file import RecordFile
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import RECORDS_NAME
from expertd_engine.experts.sweep import Sweep
from support.random_store import write_store

BAD = ExpertId(1, 2)


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    write_store(tmp_path / "store")
    return ExpertStore.open(tmp_path / "store")


def buffer_for(store: ExpertStore, expert: ExpertId) -> memoryview:
    return memoryview(mmap.mmap(-1, store.index.record_bytes(expert.layer)))


def damage(store: ExpertStore, expert: ExpertId) -> None:
    """Flip one bit of a record; again: flip it back."""
    with (store.path / RECORDS_NAME).open("r+b") as file:
        file.seek(store.index.record_offset(expert) + 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))


class Moody(RecordFile):
    """The first `lies` reads bring one bit that the disk does not have."""

    lies = 1

    def _read_at(self, offset: int, buffer: memoryview, expert: ExpertId) -> None:
        super()._read_at(offset, buffer, expert)
        if self.lies:
            self.lies -= 1
            buffer[7] ^= 1


def test_a_record_that_was_misread_is_read_again(store: ExpertStore, caplog: pytest.LogCaptureFixture) -> None:
    with Moody(store.path, store.index, direct=False) as moody, store.open_records() as records:
        wrong, right = buffer_for(store, BAD), buffer_for(store, BAD)
        moody.read_record(BAD, wrong)
        records.read_record(BAD, right)
        assert wrong == right
    assert "reading it once more" in caplog.text


def test_a_record_that_is_bad_twice_is_an_error_with_its_place(store: ExpertStore) -> None:
    with Moody(store.path, store.index, direct=False) as moody:
        moody.lies = 2
        with pytest.raises(StoreError, match=r"record \(layer 1, expert 2\)"):
            moody.read_record(BAD, buffer_for(store, BAD))
        moody.read_record(BAD, buffer_for(store, BAD))


@pytest.mark.parametrize("always", [False, True])
def test_later_reads_are_checked_only_if_always(store: ExpertStore, always: bool) -> None:
    with store.open_records(verify_always=always) as records:
        buffer = buffer_for(store, BAD)
        records.read_record(BAD, buffer)
        damage(store, BAD)
        if not always:
            records.read_record(BAD, buffer)
            return
        with pytest.raises(StoreError, match="corrupted"):
            records.read_record(BAD, buffer)


def test_the_sweep_finds_what_nobody_reads_and_forgets_it_when_it_is_mended(
    store: ExpertStore, caplog: pytest.LogCaptureFixture
) -> None:
    with store.open_records() as records:
        records.read_record(BAD, buffer_for(store, BAD))
        sweep = Sweep(store, records, busy=lambda: False)
        damage(store, BAD)
        for expert in store.experts():
            sweep.look_at(expert)
        [said] = sweep.first_bad()
        assert "layer 1, expert 2" in said
        assert "layer 1, expert 2" in caplog.text
        with pytest.raises(StoreError, match="corrupted"):  # what was trusted before is not any more
            records.read_record(BAD, buffer_for(store, BAD))
        damage(store, BAD)
        sweep.look_at(BAD)
        assert not sweep.first_bad()
        records.read_record(BAD, buffer_for(store, BAD))


def test_the_sweep_goes_round_while_nothing_else_reads(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd_engine.experts.sweep.SHORTEST_PAUSE_S", 0.0)
    monkeypatch.setattr("expertd_engine.experts.sweep.PASS_S", 0.0)
    count, looks = len(list(store.experts())), 0

    def busy() -> bool:
        nonlocal looks
        looks += 1
        if sweep.num_swept > count:
            sweep._closed.set()
        return looks % 3 == 0

    with store.open_records() as records:
        sweep = Sweep(store, records, busy)
        sweep.begin()
        sweep._thread.join(60)
        assert sweep.num_swept == count + 1 and not sweep.first_bad()
        sweep.close()
