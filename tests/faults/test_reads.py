"""A real engine over a bad disk: what fails is tried again or said clearly, and the next answer is right."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from expertd_engine.experts import cache
from expertd_engine.experts.async_reads import AsyncReads
from expertd_engine.experts.store_format import RECORDS_NAME
from expertd_engine.messages import Sampling
from expertd_engine.startup import Engine
from support.engine import Generated, generate, running_engine

GREEDY = Sampling(max_tokens=4, temperature=0, ignore_eos=True)
PROMPTS = ([1, 2, 3, 4, 5], [9, 8, 7], [42])
WAIT_S = 60.0

Read = Callable[[int, Sequence[memoryview], int], int]


@pytest.fixture
def engine(tiny: Path) -> Iterator[Engine]:
    """At the smallest budget, so that every step reads."""
    with running_engine(tiny, threads=1, expert_budget="10%", max_model_len=64, prefix_cache=False) as engine:
        yield engine


def answers(engine: Engine) -> list[Generated]:
    return generate(engine, PROMPTS, GREEDY)


def tokens(generated: Sequence[Generated]) -> list[list[int]]:
    return [one.token_ids for one in generated]


def errors(generated: Sequence[Generated]) -> list[str | None]:
    return [None if one.finished is None else one.finished.error for one in generated]


class Disk:
    """Reads through `os.preadv`, those begun together too, but for those that `fault` takes over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.failed = 0
        self.fault: Callable[[int, Read, Any], int | None] = lambda number, read, arguments: None
        self._read: Read = os.preadv
        self._lock = threading.Lock()
        self._ended: dict[int, list[tuple[int, int]]] = {}
        """What reads begun together came to, by who began them."""
        monkeypatch.setattr(os, "preadv", self._preadv)
        monkeypatch.setattr(AsyncReads, "begin", lambda ring, reads: self._begin(ring, reads))
        monkeypatch.setattr(AsyncReads, "under_way", property(lambda ring: len(self._ended.get(id(ring), ()))))
        monkeypatch.setattr(AsyncReads, "wait", lambda ring, _: self._ended.pop(id(ring)))

    def _preadv(self, *arguments: Any) -> int:
        with self._lock:
            number, self.count = self.count, self.count + 1
        try:
            taken = self.fault(number, self._read, arguments)
        except OSError:
            self.failed += 1
            raise
        return self._read(*arguments) if taken is None else taken

    def _begin(self, ring: AsyncReads, reads: Sequence[tuple[int, int, int, int]]) -> int:
        self._ended[id(ring)] = [(which, self._together(*read)) for which, read in enumerate(reads)]
        return len(reads)

    def _together(self, file: int, offset: int, address: int, nbytes: int) -> int:
        buffer = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
        try:
            return self._preadv(file, [buffer], offset)
        except OSError as error:
            return -(error.errno or errno.EIO)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def eio(wanted: Callable[[int], bool]) -> Callable[[int, Read, Any], int | None]:
    def fault(number: int, read: Read, arguments: Any) -> int | None:
        if wanted(number):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return None

    return fault


def test_one_unreadable_moment_costs_nobody_an_answer(engine: Engine, disk: Disk) -> None:
    expected = tokens(answers(engine))
    reads = disk.count
    assert reads > 30
    for nth in range(0, reads, 5):
        disk.count, disk.fault = 0, eio(lambda number, nth=nth: number == nth)  # type: ignore[misc]  # the loop's value
        generated = answers(engine)
        assert tokens(generated) == expected and errors(generated) == [None] * 3, nth
    assert disk.failed > 3, "whether the ledger or the thread that read asks again"


def test_a_disk_that_stays_broken_fails_requests_with_the_place_and_never_the_engine(
    engine: Engine, disk: Disk
) -> None:
    expected = tokens(answers(engine))
    for nth in (0, 7, 20):
        disk.count, disk.fault = 0, eio(lambda number, nth=nth: number >= nth)  # type: ignore[misc]  # the loop's value
        for message in errors(answers(engine)):
            assert message is not None
            assert RECORDS_NAME in message and "layer" in message and "Input/output error" in message
        disk.fault = eio(lambda number: False)
        assert tokens(answers(engine)) == expected


@pytest.mark.parametrize("most", [4096, 5000, 8192])
def test_short_reads_are_gone_on_with(engine: Engine, disk: Disk, most: int) -> None:
    expected = tokens(answers(engine))

    def fault(number: int, read: Read, arguments: Any) -> int | None:
        fd, [buffer], offset = arguments
        return min(read(fd, [buffer], offset), most)

    disk.fault = fault
    assert tokens(answers(engine)) == expected


def test_a_read_that_stalls_is_waited_for(engine: Engine, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long: nothing else is lost, and the engine goes on giving signs of life."""
    expected = tokens(answers(engine))
    monkeypatch.setattr(cache, "PULSE_S", 0.01)
    stalled, go_on = threading.Event(), threading.Event()

    def fault(number: int, read: Read, arguments: Any) -> int | None:
        if not go_on.is_set():
            stalled.set()
            assert go_on.wait(WAIT_S)
        return None

    disk.fault = fault
    generated: list[Generated] = []
    thread = threading.Thread(target=lambda: generated.extend(answers(engine)))
    thread.start()
    assert stalled.wait(WAIT_S)
    alive = threading.Event()
    monkeypatch.setattr(engine.cache, "pulse", alive.set)
    assert alive.wait(WAIT_S)
    assert thread.is_alive() and not generated
    go_on.set()
    thread.join(WAIT_S)
    assert tokens(generated) == expected


def test_a_file_truncated_under_the_engine_is_named_and_a_mended_one_served(engine: Engine, tiny: Path) -> None:
    expected = tokens(answers(engine))
    path = tiny / RECORDS_NAME
    whole = path.read_bytes()
    try:
        os.truncate(path, 8192)
        messages = errors(answers(engine))
        assert all(message and "the file ends here" in message and RECORDS_NAME in message for message in messages)
    finally:
        path.write_bytes(whole)
    assert tokens(answers(engine)) == expected


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 TB")])
def test_an_allocation_that_fails_once_is_made_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    expected = tokens(answers(engine))
    real = engine.cache.lease
    for nth in range(0, 12, 2):
        calls = iter(range(10**6))

        def lease(*arguments: Any, nth: int = nth, calls: Iterator[int] = calls, **options: Any) -> Any:
            if next(calls) == nth:
                raise error
            return real(*arguments, **options)

        monkeypatch.setattr(engine.cache, "lease", lease)
        generated = answers(engine)
        assert tokens(generated) == expected and errors(generated) == [None] * 3


def test_an_allocation_that_never_works_fails_requests_and_never_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(answers(engine))

    def lease(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine.cache, "lease", lease)
        assert all(message and "memory" in message for message in errors(answers(engine)))
    assert tokens(answers(engine)) == expected
