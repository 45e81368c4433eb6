"""Tokens drawn from a step's logits where these lie: one number in [0, 1) a row, and the inverse of the distribution.

`model.sampler` says which rows are drawn so; what it does for all others takes their logits to the host, which for a
large vocabulary takes longer than a layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


class Drawing:
    """Draws for rows of one width. Owns what programs leave for the last one."""

    def __init__(self, rows: int, width: int, device: torch.device | str) -> None:
        """For up to `rows` rows of `width` numbers."""
        self._parts = triton.cdiv(width, _BLOCK)
        self._sums = torch.empty(rows, self._parts, dtype=torch.float64, device=device)
        self._done = torch.zeros(rows, dtype=torch.int32, device=device)

    def __call__(self, logits: Tensor, tokens: Tensor, draws: tuple[Tensor, Tensor, Tensor]) -> None:
        """`tokens` int64 `[R]` has the best of each row of float32 `logits` `[R, width]`, and is left with the token
        that the row draws, which depends on the row alone.

        `draws`: float32 `[R]`, what logits are divided by, 0 for rows that take the best; float32 `[R]`, at most 0, how
        far a logit, divided, may lie behind the best (below that the token never comes); int32 `[R]`, 32 random bits.
        """
        _draw_kernel[(len(logits), self._parts)](
            *(logits, tokens, *draws, self._sums, self._done, logits.stride(0), logits.shape[1]),
            PARTS=self._parts,
            BLOCK=_BLOCK,
            BLOCK_PARTS=triton.next_power_of_2(self._parts),
            num_warps=8,
        )


@triton.jit
def _draw_kernel(
    logits: tl.tensor, tokens: tl.tensor, temperatures: tl.tensor, least: tl.tensor, words: tl.tensor,
    sums: tl.tensor, done: tl.tensor, stride: tl.tensor, width: tl.tensor,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
) -> None:  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        begin, lowest = logits + row * stride, tl.load(least + row)
        highest = tl.load(begin + tl.load(tokens + row))
        i = part * BLOCK + tl.arange(0, BLOCK)
        weights = _weights(begin, i, width, highest, temperature, lowest)
        tl.store(sums + row * PARTS + part, tl.sum(weights, 0))
        tl.debug_barrier()  # all threads have written before one says so
        if tl.atomic_add(done + row, 1, sem="acq_rel") == PARTS - 1:
            tl.store(done + row, 0)
            p = tl.arange(0, BLOCK_PARTS)
            each = tl.load(sums + row * PARTS + p, p < PARTS, 0.0, cache_modifier=".cg")
            share = (tl.load(words + row).to(tl.int64) & 4294967295).to(tl.float64) * 2.3283064365386963e-10
            target = tl.sum(each, 0) * share
            nth, before = _reached(each, target, BLOCK_PARTS)
            i = nth * BLOCK + tl.arange(0, BLOCK)
            weights = _weights(begin, i, width, highest, temperature, lowest)
            at, _ = _reached(weights, target - before, BLOCK)
            tl.store(tokens + row, (nth * BLOCK + at).to(tl.int64))


@triton.jit
def _weights(
    begin: tl.tensor, i: tl.tensor, width: tl.tensor, highest: tl.tensor, temperature: tl.tensor, lowest: tl.tensor
) -> tl.tensor:
    """What each of these tokens weighs; the best of the row weighs 1. float64, which sums of many need."""
    behind = (tl.load(begin + i, i < width, float("-inf")) - highest) / temperature
    return tl.where(behind >= lowest, tl.exp(behind), 0.0).to(tl.float64)  # NaN is not at least anything


@triton.jit
def _reached(weights: tl.tensor, target: tl.tensor, COUNT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Where the sum of `weights` `[COUNT]` comes past the target, and the sum before that. If rounding lets none come
    past it, that is the last that weighs anything."""
    i, upto = tl.arange(0, COUNT), tl.cumsum(weights, 0)
    first = tl.min(tl.where((weights > 0.0) & (upto > target), i, COUNT), 0)
    last = tl.max(tl.where(weights > 0.0, i, 0), 0)
    place = tl.where(first == COUNT, last, first)
    return place, tl.sum(tl.where(i == place, upto - weights, 0.0), 0)
