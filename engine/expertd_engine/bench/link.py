"""How fast a card reads the host's pinned memory: by copies, as prefetches do, and by a kernel, as misses do."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_PIECES = 64
_WORDS = 4096
_RUNS = 5


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Bytes a second."""

    copy: float
    kernel: float


def measure_link(record_bytes: int) -> LinkSpeed:
    """Best of several runs over records of that length, a few dozen in a row."""
    words = -(-record_bytes // 8)
    host = torch.zeros(_PIECES, words, dtype=torch.int64, pin_memory=True)
    card = torch.empty_like(host, device="cuda")
    out = torch.zeros(1, dtype=torch.int64, device="cuda")

    def copy() -> None:
        for target, source in zip(card, host, strict=True):
            target.copy_(source, non_blocking=True)

    def read() -> None:
        grid = (triton.cdiv(host.numel(), _WORDS),)
        _read_kernel[grid](host.data_ptr(), out, host.numel(), WORDS=_WORDS, num_warps=8)

    return LinkSpeed(*(host.nbytes / min(_timed(run) for _ in range(_RUNS)) for run in (copy, read)))


def _timed(run: object) -> float:
    assert callable(run)
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


@triton.jit
def _read_kernel(address: int, out: tl.tensor, count: int, WORDS: tl.constexpr) -> None:
    """Read `count` int64 words at `address`; their sum is stored where it is none of zeros, so that nothing is left
    out."""
    source = address.to(tl.pointer_type(tl.int64))
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    total = tl.sum(tl.load(source + at, mask=at < count, other=0), 0)
    if total != 0:
        tl.store(out, total)
