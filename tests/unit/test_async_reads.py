"""Many reads at once: every byte where it belongs, what cannot be read told by name, and a way without the kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd_engine.errors import StoreError
from expertd_engine.experts.async_reads import AsyncReads
from expertd_engine.experts.events import ExpertId, Failed, Load, Loaded, Priority
from expertd_engine.experts.transfer import Completion, Transfers

PAGE, RECORDS, TORN, GATE = 4096, 12, 7, 99
WAIT_S = 300.0


class Records:
    """Record i of the file: a page of bytes i. `TORN` lies beyond its end; `GATE` keeps the thread until it opens."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"".join(bytes([i]) * PAGE for i in range(RECORDS)))
        self.file = os.open(path, os.O_RDONLY)
        self.gate = threading.Event()
        self.alone: list[int] = []
        """Read by themselves."""

    def place_of(self, expert: ExpertId) -> tuple[int, int] | None:
        if expert.expert == GATE:
            return None
        return self.file, PAGE * (RECORDS if expert.expert == TORN else expert.expert)

    def read_record(self, expert: ExpertId, buffer: memoryview) -> None:
        self.alone.append(expert.expert)
        if expert.expert == GATE:
            assert self.gate.wait(WAIT_S)
        elif expert.expert == TORN:
            raise StoreError("torn")
        else:
            os.preadv(self.file, [buffer], PAGE * expert.expert)


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    found = Records(tmp_path / "records")
    yield found
    os.close(found.file)


def loaded(records: Records, priority: Priority) -> list[Completion]:
    """All records, in line before the only thread looks. Those that came are right."""
    slots = memoryview(mmap.mmap(-1, RECORDS * PAGE))
    views = [slots[i * PAGE : (i + 1) * PAGE] for i in range(RECORDS)]
    transfers = Transfers(records, threads=1)
    transfers.submit(Load(GATE, ExpertId(0, GATE), 0, Priority.DEMAND), memoryview(bytearray(1)))
    for i, view in enumerate(views):
        transfers.submit(Load(i, ExpertId(0, i), i, priority), view)
    records.gate.set()
    told = [transfers.completions.get(timeout=WAIT_S) for _ in range(RECORDS + 1)]
    transfers.close()
    assert transfers.depth() == 0 and sum(transfers.stats.latency_counts) == len(told)
    assert transfers.read_bytes == (RECORDS - 1) * PAGE + 1
    for completion in told:
        if isinstance(completion, Loaded) and completion.load_id != GATE:
            assert views[completion.load_id] == bytes([completion.load_id]) * PAGE
    return told


def test_demands_in_line_are_read_together_and_what_cannot_be_is_named(records: Records) -> None:
    told = loaded(records, Priority.DEMAND)
    assert Failed(TORN, "StoreError: torn") in told
    assert {completion.load_id for completion in told if isinstance(completion, Loaded)} == {*range(RECORDS), GATE} - {
        TORN
    }
    assert records.alone == [GATE, TORN], "what the kernel cannot read whole is read again"


def test_prefetches_are_read_one_by_one_since_demands_overtake_them(records: Records) -> None:
    assert len(loaded(records, Priority.PREFETCH)) == RECORDS + 1
    assert records.alone == [GATE, *range(RECORDS)]


def test_what_the_kernel_does_not_take_is_read_one_by_one(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = AsyncReads.begin
    monkeypatch.setattr(AsyncReads, "begin", lambda ring, reads: begin(ring, reads[:3]))
    assert len(loaded(records, Priority.DEMAND)) == RECORDS + 1
    assert records.alone == [GATE, *range(3, RECORDS)]


def test_a_kernel_that_has_none_to_give_is_named(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(ring: AsyncReads, most: int) -> None:
        raise OSError(errno.EAGAIN, "none left")

    monkeypatch.setattr(AsyncReads, "__init__", refused)
    records.gate.set()
    transfers = Transfers(records, threads=1)
    assert transfers.one_by_one == "none left"
    transfers.close()
    assert len(loaded(records, Priority.DEMAND)) == RECORDS + 1
    assert records.alone == [GATE, *range(RECORDS)]


def test_more_than_there_is_room_for_is_refused(records: Records) -> None:
    ring = AsyncReads(2)
    memory = memoryview(bytearray(3 * PAGE))
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    reads = [(records.file, i * PAGE, first + i * PAGE, PAGE) for i in range(3)]
    with pytest.raises(ValueError, match=r"3 reads on top of 0 are not allowed: 2 at once"):
        ring.begin(reads)
    assert ring.begin(reads[:2]) == 2
    with pytest.raises(ValueError, match="1 reads on top of 2"):
        ring.begin(reads[:1])
    assert sorted(ring.wait(2)) == [(0, PAGE), (1, PAGE)] and ring.under_way == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        ring.begin([(1 << 20, 0, first, PAGE)])
    ring.close()
    ring.close()
