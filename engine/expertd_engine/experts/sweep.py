"""Reads every record now and then, slowly and while nothing else reads, and compares checksums: a disk that forgets is
found before the record is needed. Owner of one thread and a scratch buffer.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable
from itertools import cycle

from expertd_engine.errors import StoreError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.record_file import RecordFile
from expertd_engine.experts.store import ExpertStore

logger = logging.getLogger(__name__)

PASS_S = 24 * 3600.0
"""Seconds in which every record is looked at once, if the disk has time."""
SHORTEST_PAUSE_S = 1.0
SCRATCH_BYTES = 2**20


class Sweep:
    """`busy` says whether the disk has other work: then the next record waits for another pause."""

    def __init__(self, store: ExpertStore, records: RecordFile, busy: Callable[[], bool]) -> None:
        self._bad: dict[ExpertId, str] = {}
        """What the last look at each bad record said; one that has become good again leaves."""
        self._lock = threading.Lock()
        self.num_swept = 0
        self._records = records
        self._busy = busy
        self._experts = list(store.experts())
        self._scratch = memoryview(mmap.mmap(-1, SCRATCH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep", daemon=True)

    @property
    def pause_s(self) -> float:
        return max(SHORTEST_PAUSE_S, PASS_S / len(self._experts))

    def begin(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the record it is at."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def first_bad(self) -> list[str]:
        """What is wrong with the first eight."""
        with self._lock:
            return [said for _, said in sorted(self._bad.items())[:8]]

    def look_at(self, expert: ExpertId) -> None:
        """Read one record and note whether it is what it was."""
        try:
            self._records.verify_record(expert, self._scratch)
        except StoreError as error:
            logger.error("%s", error)
            with self._lock:
                self._bad[expert] = str(error)
        else:
            with self._lock:
                self._bad.pop(expert, None)
        self.num_swept += 1

    def _run(self) -> None:
        for expert in cycle(self._experts):
            while not self._closed.wait(self.pause_s) and self._busy():
                continue
            if self._closed.is_set():
                return
            self.look_at(expert)
