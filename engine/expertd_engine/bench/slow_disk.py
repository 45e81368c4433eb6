"""A store whose records come no faster than a stated disk would bring them: what an edge box has, on a quick one."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.record_file import RecordFile
from expertd_engine.experts.store import ExpertStore


class _SlowRecords(RecordFile):
    """Reads take turns: a record has come once all before it have, and its own bytes."""

    def __init__(self, store: ExpertStore, bytes_per_s: float, *, direct: bool, verify_always: bool) -> None:
        super().__init__(store.path, store.index, direct=direct, verify_always=verify_always)
        self._bytes_per_s = bytes_per_s
        self._turn = threading.Lock()
        self._free_at = 0.0

    def read_record(self, expert: ExpertId, buffer: memoryview) -> None:
        with self._turn:
            begins = max(self._free_at, time.perf_counter())
            ends = self._free_at = begins + buffer.nbytes / self._bytes_per_s
        super().read_record(expert, buffer)
        time.sleep(max(0.0, ends - time.perf_counter()))

    def place_of(self, expert: ExpertId) -> None:
        """Nobody reads past the turns."""


@dataclass(frozen=True, slots=True)
class SlowStore(ExpertStore):
    """An opened store, read at `bytes_per_s` at most by all threads together."""

    bytes_per_s: float

    def open_records(self, *, direct: bool = True, verify_always: bool = False) -> RecordFile:
        return _SlowRecords(self, self.bytes_per_s, direct=direct, verify_always=verify_always)


def open_store(path: Path, disk_mib_s: float | None) -> ExpertStore:
    """The store at `path`, as quick as its disk is or as one of `disk_mib_s` MiB/s. Raises StoreError."""
    store = ExpertStore.open(path)
    return store if disk_mib_s is None else SlowStore(store.path, store.index, disk_mib_s * 2**20)
