"""The kernels of `kernels.given`: they read the host's pinned memory, a launch's first work."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.given import PART

_TAKEN = 1024
"""Numbers a program."""


def take(source: Tensor, target: Tensor) -> None:
    """See `kernels.given`."""
    take_step(source, target, slice(0, 0), source)


def take_step(source: Tensor, target: Tensor, ids: slice, brought: Tensor) -> None:
    """See `kernels.given`."""
    count = source.numel()
    _take_kernel[(triton.cdiv(count, _TAKEN),)](
        source, target, count, brought, ids.start, ids.stop, BLOCK=_TAKEN, num_warps=8
    )


def hand_over(source: Tensor, target: Tensor, turn: Tensor) -> None:
    """See `kernels.given`."""
    count = len(source)
    _hand_over_kernel[(1,)](
        source, target, turn, count, target.stride(0), BLOCK=max(32, triton.next_power_of_2(count)), num_warps=1
    )


def apply_words(staged: Tensor, turn: Tensor, words: Tensor, cleared: Tensor, taken: Tensor) -> None:
    """See `kernels.given`."""
    count = staged.shape[1]
    if count != PART * len(taken) or cleared.numel() > count:
        raise ValueError(
            f"{count} words beside {cleared.numel()} to clear in {len(taken)} parts: {PART} a part, and no fewer"
        )
    _apply_kernel[(len(taken),)](
        staged, turn, words, cleared, taken, cleared.numel(), COUNT=count, BLOCK=PART, num_warps=PART // 32
    )


@triton.jit(do_not_specialize=["first", "last"])
def _take_kernel(
    source: tl.tensor, target: tl.tensor, count: tl.tensor, brought: tl.tensor, first: tl.tensor, last: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + i, i < count, 0, volatile=True)
    unseen = (i >= first) & (i < last) & (value < 0)
    known = tl.load(brought + (-1 - value), unseen, 0).to(value.dtype)
    tl.store(target + i, tl.where(unseen, known, value), i < count)


@triton.jit
def _hand_over_kernel(
    source: tl.tensor, target: tl.tensor, turn: tl.tensor, count: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr
) -> None:
    i = tl.arange(0, BLOCK)
    tl.store(target + tl.load(turn) * stride + i, tl.load(source + i, i < count, 0), i < count)


@triton.jit
def _apply_kernel(
    staged: tl.tensor, turn: tl.tensor, words: tl.tensor, cleared: tl.tensor, taken: tl.tensor, num_cleared: tl.tensor,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    part = tl.program_id(0)
    i = part * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(turn, volatile=True)
    index, value = tl.load(staged + i, volatile=True), tl.load(staged + COUNT + i, volatile=True)
    tl.store(words + index, value)
    tl.store(cleared + i, 0, i < num_cleared)
    nothing = tl.sum(tl.where(index < 0, value, 0), 0)  # no index is; but to know that, all must have been read
    tl.store(taken + part, number + nothing)
