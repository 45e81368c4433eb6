"""Products with dense matrices on the device, and rows of the embedding.

Two forms. *rows*: each program keeps some rows of W in registers and goes over the inputs; the order of sums depends
on W's shape alone, so a result's bits do not depend on how many inputs there are. *tiles*: tensor cores.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.cuda.launch import OPTIONS, wait_for_inputs
from expertd_engine.kernels.cuda.matrices import DeviceMatrix
from expertd_engine.kernels.cuda.norms import DeviceNorm, norm_rows
from expertd_engine.kernels.cuda.words import finish, product_by_words, words_config
from expertd_engine.kernels.formats import QUANTISED
from expertd_engine.model.native_abi import NormKind

Form = Literal["auto", "rows", "tiles"]

_NORM_IN_TILES_MAX = 16
"""Inputs up to which *tiles* norms them itself: more do not fit into a program's registers."""


class RowsConfig(NamedTuple):
    """How *rows* is cut: rows of W and inputs of one program, and its warps."""

    block_n: int
    inputs: int
    warps: int


class TilesConfig(NamedTuple):
    """How *tiles* is cut: rows of W, inputs and columns of one step, warps, and loads under way."""

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int


def matmul(
    x: Tensor,
    matrix: DeviceMatrix,
    out: Tensor,
    *,
    norm: DeviceNorm | None = None,
    add: bool = False,
    scale: float = 1.0,
    normed: Tensor | None = None,
    form: Form = "auto",
) -> None:
    """out = scale * (W norm(x) + bias), or with `add` that more than it was.

    x `[R, cols]` float32 or bfloat16, out float32 `[R, rows]`; numbers of a row lie side by side. For few rows an RMS
    norm is part of the product; otherwise norm(x) is left in `normed` `[R, cols]`, float32 or bfloat16, without which
    it is a ValueError.
    """
    count = len(x)
    form = form if form != "auto" else "rows" if count <= rows_max(matrix) else "tiles"
    if norm is not None and not (norm.kind == NormKind.RMS and (form == "rows" or count <= _NORM_IN_TILES_MAX)):
        if normed is None:
            raise ValueError(
                f"a product of {count} rows with a norm of kind {norm.kind.name} needs room for its results"
            )
        norm_rows(x, norm, normed)
        x, norm = normed, None
    if form == "tiles":
        product_by_tiles(x, matrix, out, norm, add, scale, tiles_config(matrix, count))
    elif matrix.format in QUANTISED:
        product_by_words(x, matrix, out, norm, add, scale, words_config(matrix, count))
    else:
        product_by_rows(x, matrix, out, norm, add, scale, rows_config(matrix, count))


def rows_max(matrix: DeviceMatrix) -> int:
    """Inputs up to which the form is *rows* unless asked otherwise: where tensor cores begin to pay."""
    return 1 if matrix.format == "bfloat16" else 16


def rows_config(matrix: DeviceMatrix, count: int) -> RowsConfig:
    """What was fastest on an H100 for a matrix of floats and `count` inputs."""
    cols = triton.next_power_of_2(matrix.padded)
    warps = max(1, min(8, cols // 1024))
    return RowsConfig(max(1, min(4, 32 * 32 * warps // cols)), min(4, triton.next_power_of_2(count)), warps)


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


def product_by_rows(
    x: Tensor, matrix: DeviceMatrix, out: Tensor, norm: DeviceNorm | None, add: bool, scale: float, config: RowsConfig
) -> None:
    """`matmul` with a matrix of floats in form *rows*; `norm` is an RMS norm."""
    gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    piece = 16 // matrix.data.itemsize
    pieces = matrix.padded // piece
    _rows_kernel[(triton.cdiv(matrix.rows, config.block_n), triton.cdiv(len(x), config.inputs))](
        *(x, matrix.data, matrix.bias, gain, out),
        *(len(x), matrix.rows, x.stride(0), out.stride(0), eps, scale),
        COLS=matrix.cols,
        PIECES=pieces,
        PIECE=piece,
        BLOCK_N=config.block_n,
        BLOCK_V=triton.next_power_of_2(pieces),
        INPUTS=config.inputs,
        ADD=add,
        num_warps=config.warps,
        **OPTIONS,
    )


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
        **OPTIONS,
    )


def embed(matrix: DeviceMatrix, ids: Tensor, scale: float, out: Tensor) -> None:
    """out[r] = scale * W[ids[r]]: ids int64 `[R]`, each below `rows`; out float32 `[R, cols]`."""
    groups = matrix.padded // 32
    _embed_kernel[(len(ids),)](
        *(ids, matrix.data, matrix.scales, matrix.minima, out, out.stride(0), scale),
        COLS=matrix.cols,
        GROUPS=groups,
        FORMAT=matrix.format,
        BLOCK_G=triton.next_power_of_2(groups),
        num_warps=4,
        **OPTIONS,
    )


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


@triton.jit
def _rows_kernel(
    x: tl.tensor, data: tl.tensor, bias: tl.tensor, gain: tl.tensor, out: tl.tensor,
    count: tl.tensor, rows: tl.tensor, x_stride: tl.tensor, out_stride: tl.tensor, eps: tl.tensor, scale: tl.tensor,
    COLS: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    INPUTS: tl.constexpr, ADD: tl.constexpr,
) -> None:  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    v = tl.arange(0, BLOCK_V)
    column = (v * PIECE)[None, :, None] + tl.arange(0, PIECE)[None, None, :]
    stored = (n[:, None] < rows - first) & (v < PIECES)[None, :]
    at = (n * (PIECES * PIECE))[:, None, None] + column
    weights = tl.load(data + first.to(tl.int64) * (PIECES * PIECE) + at, stored[:, :, None], 0.0).to(tl.float32)
    wait_for_inputs()
    for index in tl.static_range(INPUTS):
        row = tl.program_id(1) * INPUTS + index
        cols = tl.where(row < count, COLS, 0)
        given = tl.load(x + row.to(tl.int64) * x_stride + column, column < cols, 0.0).to(tl.float32)
        factor = tl.full([1], 1.0, tl.float32)
        if gain is not None:
            factor = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(given * given, 2), 1) / COLS + eps)
            given = given * tl.load(gain + column, column < COLS, 0.0)
        result = tl.sum(tl.sum(weights * given, 2), 1) * factor
        end = tl.where(row < count, rows, 0)
        finish(result, bias, out + row.to(tl.int64) * out_stride, first + n, end, scale, ADD)


@triton.jit
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
    wait_for_inputs()
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
def _embed_kernel(
    ids: tl.tensor, data: tl.tensor, scales: tl.tensor, minima: tl.tensor, out: tl.tensor, out_stride: tl.tensor,
    scale: tl.tensor,
    COLS: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, BLOCK_G: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs()
    wanted = tl.load(ids + tl.program_id(0)).to(tl.int64)
    begin = out + tl.program_id(0).to(tl.int64) * out_stride
    g = tl.arange(0, BLOCK_G)[:, None]
    if FORMAT == "float32" or FORMAT == "bfloat16":
        column = g * 32 + tl.arange(0, 32)[None, :]
        values = tl.load(data + wanted * (GROUPS * 32) + column, column < COLS, 0.0).to(tl.float32)
        tl.store(begin + column, values * scale, column < COLS)
    else:
        BYTES: tl.constexpr = 32 if FORMAT == "int8" else 16
        column = g * 32 + tl.arange(0, BYTES)[None, :]
        kept = tl.load(data + wanted * (GROUPS * BYTES) + g * BYTES + tl.arange(0, BYTES)[None, :], g < GROUPS, 0)
        steps = tl.load(scales + wanted * GROUPS + g, g < GROUPS, 0.0).to(tl.float32)
        if FORMAT == "int8":
            tl.store(begin + column, low_steps(kept, FORMAT) * steps * scale, column < COLS)
        else:
            zeros = zero_step(minima, steps, wanted * GROUPS + g, g < GROUPS, FORMAT)
            tl.store(begin + column, (low_steps(kept, FORMAT) * steps + zeros) * scale, column < COLS)
            tl.store(begin + column + 16, (high_steps(kept) * steps + zeros) * scale, column + 16 < COLS)
