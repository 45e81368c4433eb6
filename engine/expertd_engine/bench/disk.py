"""How fast this box moves weights: records from disk as the engine reads them, and memory as its cores read it."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from expertd_engine.bench.protocol import DiskRead
from expertd_engine.errors import StoreError
from expertd_engine.experts.events import ExpertId, Failed, Load, Priority
from expertd_engine.experts.slab import Slab
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.transfer import Transfers

_MEMORY_BYTES = 512 * 2**20
_MEMORY_TURNS = 5


def read_bandwidth(store: ExpertStore, threads: int, seconds: float, seed: int = 0) -> DiskRead:
    """Read records in random order for about `seconds`: the engine's threads, its reads, two in flight for each thread.

    Raises StoreError for a record that cannot be read.
    """
    experts = list(store.experts())
    largest = max(layout.bytes for layout in store.index.layouts)
    slab = Slab(2 * threads, largest)
    rng = random.Random(seed)
    with store.open_records() as records:
        transfers = Transfers(records, threads)
        try:
            moved, elapsed_s = _read(store, transfers, slab, experts, rng, seconds)
        finally:
            transfers.close()
        return DiskRead(moved / elapsed_s, records.direct, largest, threads)


def _read(
    store: ExpertStore, transfers: Transfers, slab: Slab, experts: list[ExpertId], rng: random.Random, seconds: float
) -> tuple[int, float]:
    """Bytes and seconds, from the first request to the last answer."""
    in_flight: dict[int, memoryview] = {}
    """Where each load goes, by its number."""
    free = [slab.view(slot, slab.slot_bytes) for slot in range(slab.num_slots)]
    submitted = moved = 0
    began = time.perf_counter()
    while True:
        while free and time.perf_counter() - began < seconds:
            expert = rng.choice(experts)
            in_flight[submitted] = free.pop()
            size = store.index.record_bytes(expert.layer)
            transfers.submit(Load(submitted, expert, 0, Priority.DEMAND), in_flight[submitted][:size])
            submitted += 1
            moved += size
        if not in_flight:
            break
        completion = transfers.completions.get()
        if isinstance(completion, Failed):
            raise StoreError(f"a record of {store.path} cannot be read: {completion.reason}")
        free.append(in_flight.pop(completion.load_id))
    return moved, time.perf_counter() - began


def memory_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` cores read together from memory far larger than their caches; best of several."""
    words = np.ones(_MEMORY_BYTES // 8, np.int64)
    parts = np.array_split(words, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_MEMORY_TURNS):
            began = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = min(best, time.perf_counter() - began)
    return words.nbytes / best
