"""Products with dense matrices on tensor cores, and what stored steps stand for.

Operands are bfloat16, or all is float32 where W is that; sums are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.cuda.matrices import DeviceMatrix
from expertd_engine.kernels.cuda.norms import DeviceNorm


class TilesConfig(NamedTuple):
    """How *tiles* is cut: rows of W, inputs and columns of one step, warps, and loads under way."""

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int


def tiles_config(matrix: DeviceMatrix, count: int) -> TilesConfig:
    """What was fastest on an H100 for a matrix and `count` inputs."""
    block_m = max(16, min(128, triton.next_power_of_2(count)))
    if matrix.format == "float32":
        return TilesConfig(32, min(32, block_m), 32, 4, 2)
    if block_m > 16:
        return TilesConfig(64 if block_m < 128 else 128, block_m, 64, 4 if block_m < 128 else 8, 3)
    if matrix.format == "bfloat16" and matrix.rows <= 64 * 32:  # few tiles: smaller ones, so that all take part
        return TilesConfig(16, 16, 256, 4, 3)
    return TilesConfig(64, 16, 128, 4, 4)


def product_by_tiles(
    x: Tensor, matrix: DeviceMatrix, out: Tensor, norm: DeviceNorm | None, add: bool, scale: float, config: TilesConfig
) -> None:
    """`matmul` in form *tiles*: operands bfloat16, or all in float32 where W is that; `norm` is an RMS norm."""
    gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    grid = (triton.cdiv(len(x), config.block_m), triton.cdiv(matrix.rows, config.block_n))
    _tiles_kernel[grid](
        *(x, matrix.data, matrix.scales, matrix.minima, matrix.bias, gain, out),
        *(len(x), matrix.rows, x.stride(0), out.stride(0), eps, scale),
        COLS=matrix.cols,
        PADDED=matrix.padded,
        FORMAT=matrix.format,
        BLOCK_N=config.block_n,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        ADD=add,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@triton.jit(do_not_specialize=["count"])  # one kernel whatever the number of inputs
def _tiles_kernel(
    x: tl.tensor, data: tl.tensor, scales: tl.tensor, minima: tl.tensor, bias: tl.tensor, gain: tl.tensor,
    out: tl.tensor, count: tl.tensor, rows: tl.tensor, x_stride: tl.tensor, out_stride: tl.tensor,
    eps: tl.tensor, scale: tl.tensor,
    COLS: tl.constexpr, PADDED: tl.constexpr, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, ADD: tl.constexpr,
) -> None:  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = x + m.to(tl.int64)[:, None] * x_stride
    WIDTH: tl.constexpr = BLOCK_K // 2 if FORMAT == "int4" or FORMAT == "int4s" else BLOCK_K
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for begin in range(0, PADDED, BLOCK_K):
        if FORMAT == "float32" or FORMAT == "bfloat16":
            k = begin + tl.arange(0, BLOCK_K)
            stored = (n < rows)[:, None] & (k < PADDED)[None, :]
            weights = tl.load(data + n.to(tl.int64)[:, None] * PADDED + k[None, :], stored, 0.0)
            sums, squares = _multiplied(sums, squares, weights, inputs, gain, m < count, k, COLS)
        else:
            low, high = _group_tile(data, scales, minima, n, rows, begin, PADDED, FORMAT, BLOCK_N, BLOCK_K)
            j = tl.arange(0, WIDTH)
            k = begin + (j if FORMAT == "int8" else j // 16 * 32 + j % 16)
            sums, squares = _multiplied(sums, squares, low, inputs, gain, m < count, k, COLS)
            if FORMAT != "int8":
                sums, squares = _multiplied(sums, squares, high, inputs, gain, m < count, k + 16, COLS)
    if gain is not None:
        sums = sums * (1.0 / tl.sqrt_rn(tl.sum(squares, 1) / COLS + eps))[None, :]
    if bias is not None:
        sums = sums + tl.load(bias + n, n < rows, 0.0)[:, None]
    result = tl.trans(sums) * scale
    to = out + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    mask = (m < count)[:, None] & (n < rows)[None, :]
    if ADD:
        result = result + tl.load(to, mask, 0.0)
    tl.store(to, result, mask)


@triton.jit
def _multiplied(
    sums: tl.tensor, squares: tl.tensor, weights: tl.tensor, inputs: tl.tensor, gain: tl.tensor, lives: tl.tensor,
    k: tl.tensor, COLS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Sums `[N, M]` and the products of W's columns k with these of the inputs; for a norm, these' squares too."""
    given = tl.load(inputs + k[None, :], lives[:, None] & (k < COLS)[None, :], 0.0)
    if gain is not None:
        given = given.to(tl.float32)
        squares = squares + given * given
        given = given * tl.load(gain + k, k < COLS, 0.0)[None, :]
    return tl.dot(weights, tl.trans(given.to(weights.dtype)), sums, input_precision="ieee"), squares


@triton.jit
def _group_tile(
    data: tl.tensor, scales: tl.tensor, minima: tl.tensor, n: tl.tensor, rows: tl.tensor, begin: tl.tensor,
    PADDED: tl.constexpr, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """bfloat16 `[N, K]` of a quantised W from column `begin` on; in 4 bits first and second halves of groups apart."""
    GROUPS: tl.constexpr = BLOCK_K // 32
    BYTES: tl.constexpr = 32 if FORMAT == "int8" else 16
    g = begin // 32 + tl.arange(0, GROUPS)
    mask = (n < rows)[:, None] & (g < PADDED // 32)[None, :]
    at = n.to(tl.int64)[:, None] * (PADDED // 32) + g[None, :]
    kept = tl.load(data + at[:, :, None] * BYTES + tl.arange(0, BYTES)[None, None, :], mask[:, :, None], 0)
    steps = tl.load(scales + at, mask, 0.0).to(tl.float32)
    low = low_steps(kept, FORMAT) * steps[:, :, None]
    high = low
    if FORMAT != "int8":
        zeros = zero_step(minima, steps, at, mask, FORMAT)[:, :, None]
        low = low + zeros
        high = high_steps(kept) * steps[:, :, None] + zeros
    low = tl.reshape(low.to(tl.bfloat16), (BLOCK_N, GROUPS * BYTES))
    return low, tl.reshape(high.to(tl.bfloat16), (BLOCK_N, GROUPS * BYTES))


@triton.jit
def low_steps(stored: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """What W's elements stand for but for scale and minimum: of all columns, in 4 bits of a group's first half."""
    if FORMAT == "int4" or FORMAT == "int4s":
        return (stored & 15).to(tl.float32)
    else:
        return stored.to(tl.float32)


@triton.jit
def high_steps(stored: tl.tensor) -> tl.tensor:
    """Likewise, of the second half of a 4-bit group."""
    return (stored >> 4).to(tl.float32)


@triton.jit
def zero_step(minima: tl.tensor, scale: tl.tensor, at: tl.tensor, mask: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """What a step of zero stands for in 4 bits."""
    if FORMAT == "int4":
        return tl.load(minima + at, mask, 0.0).to(tl.float32)
    else:
        return scale * -8.0
