"""Reads memory and keeps nothing: how fast a kernel can, from the host's memory or the card's own."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_WORDS = 4096


def read(memory: Tensor, out: Tensor) -> None:
    """Read int64 `memory`, which may be pinned host memory; out int64 `[1]` on the card is written where a piece's sum
    is not zero, so that nothing can be left out."""
    _read_kernel[(triton.cdiv(memory.numel(), _WORDS),)](
        memory.data_ptr(), out, memory.numel(), WORDS=_WORDS, num_warps=8
    )


@triton.jit
def _read_kernel(address: tl.tensor, out: tl.tensor, count: tl.tensor, WORDS: tl.constexpr) -> None:
    source = address.to(tl.pointer_type(tl.int64))
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    total = tl.sum(tl.load(source + at, mask=at < count, other=0), 0)
    if total != 0:
        tl.store(out, total)
