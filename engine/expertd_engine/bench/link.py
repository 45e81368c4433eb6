"""How fast a card reads the host's pinned memory: by copies, as prefetches do, and by a kernel, as misses do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from expertd_engine.kernels.cuda.link import read

_PIECES = 64
_RUNS = 5


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Bytes a second."""

    copy: float
    kernel: float
    memory: float
    """The card's own memory, read by the same kernel."""


def measure_link(record_bytes: int) -> LinkSpeed:
    """Best of several runs over records of that length, a few dozen in a row."""
    words = -(-record_bytes // 8)
    host = torch.zeros(_PIECES, words, dtype=torch.int64, pin_memory=True)
    card = torch.zeros(_PIECES, words, dtype=torch.int64, device="cuda")
    out = torch.zeros(1, dtype=torch.int64, device="cuda")

    def copy() -> None:
        for target, source in zip(card, host, strict=True):
            target.copy_(source, non_blocking=True)

    runs = (copy, lambda: read(host, out), lambda: read(card, out))
    return LinkSpeed(*(host.nbytes / min(_timed(run) for _ in range(_RUNS)) for run in runs))


def _timed(run: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began
