"""Products of a few inputs with a quantised matrix, in whole numbers: four columns an instruction.

Inputs are rounded to int8 in groups of 32, each with a scale of its own, as the CPU kernels do. Sums of a group are
exact; groups are summed in float32 in an order that depends on the matrix' shape alone: so a result's bits do not
depend on how many inputs there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.cuda.matrices import DeviceMatrix
from expertd_engine.kernels.cuda.norms import DeviceNorm
from expertd_engine.kernels.cuda.products import INTERPRETED

_ROUNDS = tl.constexpr(12582912.0)
"""1.5 * 2^23: added to a small number it leaves the nearest whole one, ties to even, in the low bits."""


class WordsConfig(NamedTuple):
    """How a product is cut: rows of W and inputs of one program, and its warps."""

    block_n: int
    inputs: int
    warps: int


class RoundedInputs(NamedTuple):
    """Inputs as whole numbers, G groups of 32 columns each."""

    words: Tensor
    """int32 `[R, G, 8]`: four int8 a word; a group's first 16 columns, then its others."""
    sizes: Tensor
    """float32 `[R, G]`: what a step stands for."""
    totals: Tensor
    """float32 `[R, G]`: the sums of steps."""
    factors: Tensor
    """float32 `[R]`: what the norm multiplies a row with."""

    @classmethod
    def of(cls, x: Tensor, groups: int, cols: int, norm: DeviceNorm | None) -> RoundedInputs:
        """Round once what every program of a product reads; `norm` is an RMS norm."""
        gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        words = torch.empty(len(x), groups, 8, dtype=torch.int32, device=x.device)
        sizes, totals = torch.empty(2, len(x), groups, device=x.device)
        made = cls(words, sizes, totals, torch.empty(len(x), device=x.device))
        _round_kernel[(len(x),)](
            *(x, gain, *made, x.stride(0), eps),
            COLS=cols,
            GROUPS=groups,
            BLOCK_G=triton.next_power_of_2(groups),
            num_warps=max(1, min(8, groups // 16)),
        )
        return made


def words_config(matrix: DeviceMatrix, count: int) -> WordsConfig:
    """What was fastest on an H100 for a matrix and `count` inputs."""
    groups = triton.next_power_of_2(matrix.padded // 32)
    warps = max(1, min(8, groups // 16))
    return WordsConfig(max(1, min(16, 8 * 32 * warps // groups)), min(4, triton.next_power_of_2(count)), warps)


def product_by_words(
    x: Tensor, matrix: DeviceMatrix, out: Tensor, norm: DeviceNorm | None, add: bool, scale: float, config: WordsConfig
) -> None:
    """`dense.matmul` with a quantised matrix; `norm` is an RMS norm."""
    groups = matrix.padded // 32
    rounded = RoundedInputs.of(x, groups, matrix.cols, norm)
    _words_kernel[(triton.cdiv(matrix.rows, config.block_n), triton.cdiv(len(x), config.inputs))](
        *(*rounded, matrix.data.view(torch.int32), matrix.scales, matrix.minima, matrix.bias, out),
        *(len(x), matrix.rows, out.stride(0), scale),
        GROUPS=groups,
        FORMAT=matrix.format,
        BLOCK_N=config.block_n,
        BLOCK_G=triton.next_power_of_2(groups),
        INPUTS=config.inputs,
        ADD=add,
        num_warps=config.warps,
    )


@triton.jit(do_not_specialize=["count"])  # one kernel whatever the number of inputs
def _words_kernel(
    words: tl.tensor, sizes: tl.tensor, totals: tl.tensor, factors: tl.tensor,
    data: tl.tensor, scales: tl.tensor, minima: tl.tensor, bias: tl.tensor, out: tl.tensor,
    count: tl.tensor, rows: tl.tensor, out_stride: tl.tensor, scale: tl.tensor,
    GROUPS: tl.constexpr, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
    INPUTS: tl.constexpr, ADD: tl.constexpr,
) -> None:  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    g = tl.arange(0, BLOCK_G)
    w = tl.arange(0, 4)[None, None, :]
    stored = (n[:, None] < rows - first) & (g < GROUPS)[None, :]
    WORDS: tl.constexpr = 8 if FORMAT == "int8" else 4
    begin = data + first.to(tl.int64) * (GROUPS * WORDS)
    at = (n * (GROUPS * WORDS))[:, None, None] + (g * WORDS)[None, :, None] + w
    low = tl.load(begin + at, stored[:, :, None], 0)
    if FORMAT == "int8":
        high = tl.load(begin + at + 4, stored[:, :, None], 0)
    group = (n * GROUPS)[:, None] + g[None, :]
    steps = tl.load(scales + first.to(tl.int64) * GROUPS + group, stored, 0.0).to(tl.float32)
    if FORMAT == "int4":
        zeros = tl.load(minima + first.to(tl.int64) * GROUPS + group, stored, 0.0).to(tl.float32)
    if FORMAT != "int8":
        high = (low >> 4) & 0x0F0F0F0F
        low = low & 0x0F0F0F0F
    for index in tl.static_range(INPUTS):
        row = tl.program_id(1) * INPUTS + index
        groups = tl.where(row < count, GROUPS, 0)
        given = row.to(tl.int64) * GROUPS + g
        word = words + (given * 8)[None, :, None] + w
        ahead = tl.load(word, (g < groups)[None, :, None], 0)
        behind = tl.load(word + 4, (g < groups)[None, :, None], 0)
        size = tl.load(sizes + given, g < groups, 0.0)[None, :]
        sums = tl.sum(dot4(high, behind, dot4(low, ahead, tl.zeros_like(low))), 2).to(tl.float32)
        if FORMAT == "int8":
            sums = sums * (steps * size)
        else:
            total = tl.load(totals + given, g < groups, 0.0)[None, :]
            if FORMAT == "int4":
                sums = sums * (steps * size) + total * (zeros * size)
            else:
                sums = (sums - 8.0 * total) * (steps * size)
        factor = tl.load(factors + row, row < count, 0.0)
        end = tl.where(row < count, rows, 0)
        finish(tl.sum(sums, 1) * factor, bias, out + row.to(tl.int64) * out_stride, first + n, end, scale, ADD)


@triton.jit
def _round_kernel(
    x: tl.tensor, gain: tl.tensor, words: tl.tensor, sizes: tl.tensor, totals: tl.tensor, factors: tl.tensor,
    x_stride: tl.tensor, eps: tl.tensor, COLS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    i = tl.arange(0, 4)[None, None, :]
    w = tl.arange(0, 4)[None, :]
    column = (g * 32)[:, None, None] + (tl.arange(0, 4) * 4)[None, :, None] + i
    low = tl.load(x + row * x_stride + column, column < COLS, 0.0).to(tl.float32)
    high = tl.load(x + row * x_stride + column + 16, column + 16 < COLS, 0.0).to(tl.float32)
    factor = 1.0
    if gain is not None:
        squares = tl.sum(tl.sum(low * low + high * high, 2), 1)
        factor = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / COLS + eps)
        low = low * tl.load(gain + column, column < COLS, 0.0)
        high = high * tl.load(gain + column + 16, column + 16 < COLS, 0.0)
    largest = tl.max(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 2), 1)
    inverse = (127.0 / tl.where(largest > 0.0, largest, 1.0))[:, None, None]
    ahead = _packed(low * inverse)
    behind = _packed(high * inverse)
    ones = tl.full([1, 4], 0x01010101, tl.int32)
    total = tl.sum(dot4(behind, ones, dot4(ahead, ones, tl.zeros_like(ahead))), 1).to(tl.float32)
    given = row * GROUPS + g
    word = words + (given * 8)[:, None] + w
    tl.store(word, ahead, (g < GROUPS)[:, None])
    tl.store(word + 4, behind, (g < GROUPS)[:, None])
    tl.store(sizes + given, largest * (1.0 / 127.0), g < GROUPS)
    tl.store(totals + given, total, g < GROUPS)
    tl.store(factors + row, factor)


@triton.jit
def _packed(values: tl.tensor) -> tl.tensor:
    """The nearest int8 of `values` `[G, 4, 4]`, four in a word."""
    i = tl.arange(0, 4)[None, None, :]
    return tl.sum(((values + _ROUNDS).to(tl.int32, bitcast=True) & 255) << (8 * i), 2)


@triton.jit
def dot4(a: tl.tensor, b: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """`sums` and the products of the four int8 in each word of `a` with those of `b`."""
    if INTERPRETED:
        for i in tl.static_range(4):
            sums = sums + ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
        return sums
    else:
        a, b = tl.broadcast(a, b)
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, sums], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def finish(
    result: tl.tensor, bias: tl.tensor, out: tl.tensor, n: tl.tensor, end: tl.tensor, scale: tl.tensor,
    ADD: tl.constexpr,
) -> None:  # fmt: skip
    """Leave sums of rows `n` of W, where below `end`, at `out` + n."""
    mask = n < end
    if bias is not None:
        result = result + tl.load(bias + n, mask, 0.0)
    result = result * scale
    if ADD:
        result = result + tl.load(out + n, mask, 0.0)
    tl.store(out + n, result, mask)
