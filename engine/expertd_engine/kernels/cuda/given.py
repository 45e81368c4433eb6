"""The kernels of `kernels.given`: they read the host's pinned memory, a launch's first work."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TAKEN, _APPLIED = 1024, 128
"""Numbers a program."""


def take(source: Tensor, target: Tensor) -> None:
    """See `kernels.given`."""
    count = source.numel()
    _take_kernel[(triton.cdiv(count, _TAKEN),)](source, target, count, BLOCK=_TAKEN, num_warps=8)


def apply_words(staged: Tensor, words: Tensor, cleared: Tensor) -> None:
    """See `kernels.given`."""
    count = staged.shape[1]
    if count % _APPLIED or cleared.numel() > count:
        raise ValueError(f"{count} words beside {cleared.numel()} to clear: a multiple of {_APPLIED}, and no fewer")
    _apply_kernel[(count // _APPLIED,)](
        staged, words, cleared, cleared.numel(), COUNT=count, BLOCK=_APPLIED, num_warps=_APPLIED // 32
    )


@triton.jit
def _take_kernel(source: tl.tensor, target: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, i < count, 0, volatile=True), i < count)


@triton.jit
def _apply_kernel(
    staged: tl.tensor, words: tl.tensor, cleared: tl.tensor, num_cleared: tl.tensor,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index, value = tl.load(staged + i, volatile=True), tl.load(staged + COUNT + i, volatile=True)
    tl.store(words + index, value)
    tl.store(cleared + i, 0, i < num_cleared)
