"""Times how long records of a store take to read when nothing else runs, as the engine reads them."""

from __future__ import annotations

import time
from random import Random

from expertd_engine.errors import StoreError
from expertd_engine.experts.events import Failed, Load, Priority
from expertd_engine.experts.slab import Slab
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.transfer import Transfers


class ReadTimer:
    """Owns threads that read, until it is closed."""

    def __init__(self, store: ExpertStore, threads: int, most: int) -> None:
        """For up to `most` records at once. Raises StoreError for a store that cannot be read."""
        self._index, self._experts = store.index, list(store.experts())
        self._slab = Slab(most, max(layout.bytes for layout in store.index.layouts))
        self._rng = Random(0)
        self._records = store.open_records()
        self._transfers = Transfers(self._records, threads)

    def seconds(self, records: int) -> float:
        """Until the last of so many random ones, asked for at once, is there. Raises StoreError if one cannot be
        read."""
        began = time.perf_counter()
        for slot, expert in enumerate(self._rng.sample(self._experts, records)):
            view = self._slab.view(slot, self._index.record_bytes(expert.layer))
            self._transfers.submit(Load(slot, expert, slot, Priority.DEMAND), view)
        for _ in range(records):
            if isinstance(completion := self._transfers.completions.get(), Failed):
                raise StoreError(f"a record cannot be read: {completion.reason}")
        return time.perf_counter() - began

    def close(self) -> None:
        self._transfers.close()
        self._records.close()
