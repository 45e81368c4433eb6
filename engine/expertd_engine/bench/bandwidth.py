"""`expertd bench io`: what disk and memory of this box give, read as the engine reads them."""

from __future__ import annotations

import os

from expertd_engine.bench.disk import memory_bandwidth, read_bandwidth
from expertd_engine.bench.report import finish, mebibytes, number, spread
from expertd_engine.bench.stats import median_interval
from expertd_engine.experts.store import ExpertStore

_SECONDS = 1.0


def io(store: ExpertStore, threads: int | None, io_threads: int, runs: int) -> str:
    """Run it; the report. `threads` read memory (None: all cores), `io_threads` the disk."""
    cores = threads or len(os.sched_getaffinity(0))
    reads = [read_bandwidth(store, io_threads, _SECONDS, seed) for seed in range(runs)]
    disk = median_interval([read.bytes_per_s for read in reads])
    memory = median_interval([memory_bandwidth(cores) for _ in range(runs)])
    kind = "direct" if reads[0].direct else "page cache"
    rows = [
        [f"disk, {io_threads} threads, {kind}, records of {mebibytes(reads[0].record_bytes)}",
         number(disk.median / 1e9), spread(disk.low / 1e9, disk.high / 1e9)],
        [f"memory, {cores} threads", number(memory.median / 1e9), spread(memory.low / 1e9, memory.high / 1e9)],
    ]  # fmt: skip
    values = {
        "command": "io", "device": f"cpu, {cores} threads", "model": store.index.name, "runs": runs,
        "disk_bytes_per_s": disk.median, "disk_interval": disk.as_json(), "direct": reads[0].direct,
        "record_bytes": reads[0].record_bytes, "io_threads": io_threads, "memory_bytes_per_s": memory.median,
        "memory_interval": memory.as_json(),
    }  # fmt: skip
    return finish(f"io: {store.path}, {runs} runs, random order", ("what", "GB/s", "95 %"), rows, [], values)
