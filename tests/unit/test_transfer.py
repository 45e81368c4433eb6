"""Transfer threads: order of service, cancelling, promoting, and that whatever happens a load ends once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from expertd_engine.errors import StoreError
from expertd_engine.experts.events import Cancelled, ExpertId, Failed, Load, Loaded, Priority
from expertd_engine.experts.transfer import Completion, Transfers

WAIT_S = 10.0


class GatedReader:
    """Reads begin when told; `begun` is the order in which they did."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.errors: dict[int, Exception] = {}
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def read_record(self, expert: ExpertId, buffer: memoryview) -> None:
        self.begun.append(expert.expert)
        self.entered.release()
        assert self.gate.acquire(timeout=WAIT_S)
        if expert.expert in self.errors:
            raise self.errors[expert.expert]
        buffer[:] = bytes([expert.expert]) * len(buffer)

    def place_of(self, expert: ExpertId) -> None:
        """Each by itself."""


@pytest.fixture
def reader() -> GatedReader:
    return GatedReader()


@pytest.fixture
def transfers(reader: GatedReader) -> Iterator[Transfers]:
    pool = Transfers(reader, threads=1)
    yield pool
    for _ in range(20):
        reader.gate.release()
    pool.close()


def submit(transfers: Transfers, number: int, priority: Priority) -> memoryview:
    buffer = memoryview(bytearray(8))
    transfers.submit(Load(number, ExpertId(0, number), number, priority), buffer)
    return buffer


def first_begins(transfers: Transfers, reader: GatedReader) -> None:
    """Keep the only thread busy with load 0."""
    submit(transfers, 0, Priority.PREFETCH)
    assert reader.entered.acquire(timeout=WAIT_S)


def results(transfers: Transfers, reader: GatedReader, count: int) -> list[Completion]:
    for _ in range(count):
        reader.gate.release()
    return [transfers.completions.get(timeout=WAIT_S) for _ in range(count)]


def test_a_load_fills_its_buffer(transfers: Transfers, reader: GatedReader) -> None:
    buffer = submit(transfers, 3, Priority.DEMAND)
    assert results(transfers, reader, 1) == [Loaded(3)]
    assert bytes(buffer) == b"\3" * 8
    assert sum(transfers.stats.latency_counts) == 1 and transfers.stats.busy_s > 0


def test_demands_overtake_prefetches_and_each_kind_keeps_its_order(transfers: Transfers, reader: GatedReader) -> None:
    first_begins(transfers, reader)
    for number, priority in enumerate((Priority.PREFETCH, Priority.DEMAND, Priority.PREFETCH, Priority.DEMAND), 1):
        submit(transfers, number, priority)
    assert results(transfers, reader, 5) == [Loaded(n) for n in (0, 2, 4, 1, 3)]
    assert reader.begun == [0, 2, 4, 1, 3]


def test_a_promoted_prefetch_goes_behind_the_queued_demands(transfers: Transfers, reader: GatedReader) -> None:
    first_begins(transfers, reader)
    for number, priority in enumerate((Priority.PREFETCH, Priority.PREFETCH, Priority.DEMAND), 1):
        submit(transfers, number, priority)
    transfers.promote(2)
    transfers.promote(0)  # has begun: no effect
    assert [r.load_id for r in results(transfers, reader, 4)] == [0, 3, 2, 1]


@pytest.mark.parametrize("priority", list(Priority))
def test_a_queued_load_can_be_cancelled(transfers: Transfers, reader: GatedReader, priority: Priority) -> None:
    first_begins(transfers, reader)
    buffer = submit(transfers, 1, priority)
    transfers.cancel(1)
    assert transfers.completions.get(timeout=WAIT_S) == Cancelled(1)
    assert results(transfers, reader, 1) == [Loaded(0)]
    assert bytes(buffer) == bytes(8) and reader.begun == [0]


def test_what_has_begun_is_not_recalled(transfers: Transfers, reader: GatedReader) -> None:
    first_begins(transfers, reader)
    transfers.cancel(0)
    assert transfers.completions.empty()
    assert results(transfers, reader, 1) == [Loaded(0)]


@pytest.mark.parametrize("error", [OSError(5, "bad disk"), StoreError("torn"), ValueError("a bug")], ids=repr)
def test_a_failure_is_told_and_the_thread_lives_on(transfers: Transfers, reader: GatedReader, error: Exception) -> None:
    reader.errors[1] = error
    submit(transfers, 1, Priority.DEMAND)
    submit(transfers, 2, Priority.DEMAND)
    failed, loaded = results(transfers, reader, 2)
    assert failed == Failed(1, f"{type(error).__name__}: {error}") and loaded == Loaded(2)


def test_closing_ends_the_threads_and_forgets_what_is_queued(reader: GatedReader) -> None:
    transfers = Transfers(reader, threads=2)
    for number in range(4):
        submit(transfers, number, Priority.PREFETCH)
    for _ in range(2):
        assert reader.entered.acquire(timeout=WAIT_S)
    closing = threading.Thread(target=transfers.close)
    closing.start()
    while not transfers._closed:  # or a reader might come back for more before
        closing.join(0.001)
    for _ in range(4):
        reader.gate.release()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert sorted(reader.begun) == [0, 1]
    assert len(results(transfers, reader, 2)) == 2 and transfers.completions.empty()


def test_what_was_read_counts_once_the_engine_hears_of_it(transfers: Transfers, reader: GatedReader) -> None:
    reader.errors[1] = OSError("gone")
    for number in range(3):
        submit(transfers, number, Priority.DEMAND)
    assert transfers.depth() == 3 and transfers.completions.read_bytes == 0
    assert results(transfers, reader, 1) == [Loaded(0)] and transfers.completions.read_bytes == 8
    results(transfers, reader, 2)  # one of them fails
    assert transfers.completions.read_bytes == 16 and transfers.depth() == 0
