"""Products with dense matrices on the device, and rows of the embedding.

In form *rows* a result's bits do not depend on how many inputs there are: all go through what is fastest for FEW.
*tiles* are tensor cores, `auto` is what is fastest for so many inputs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.cuda.matrices import DeviceMatrix
from expertd_engine.kernels.cuda.norms import DeviceNorm, norm_rows
from expertd_engine.kernels.cuda.tiles import high_steps, low_steps, product_by_tiles, tiles_config, zero_step
from expertd_engine.kernels.cuda.words import finish, product_by_words, words_config
from expertd_engine.kernels.formats import QUANTISED
from expertd_engine.model.native_abi import NormKind

Form = Literal["auto", "rows", "tiles"]

FEW = 16
"""Inputs that one tile of the smallest size takes, and that a program can norm itself."""


class RowsConfig(NamedTuple):
    """How *rows* is cut: rows of W and inputs of one program, and its warps."""

    block_n: int
    inputs: int
    warps: int


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

    x `[R, cols]` float32 or bfloat16, out float32 `[R, rows]`; numbers of a row lie side by side. For up to FEW rows
    and in form *rows* an RMS norm is part of the product; otherwise norm(x) is left in `normed` `[R, cols]`, float32 or
    bfloat16, without which it is a ValueError.
    """
    count = FEW if form == "rows" else len(x)
    if norm is not None and not (norm.kind == NormKind.RMS and count <= FEW):
        if normed is None:
            raise ValueError(f"a product of {len(x)} rows with a {norm.kind.name} norm needs room for what is normed")
        norm_rows(x, norm, normed)
        x, norm = normed, None
    if form == "tiles" or count > (1 if matrix.format == "bfloat16" else FEW):
        product_by_tiles(x, matrix, out, norm, add, scale, tiles_config(matrix, count))
    elif matrix.format in QUANTISED:
        product_by_words(x, matrix, out, norm, add, scale, words_config(matrix, count))
    else:
        product_by_rows(x, matrix, out, norm, add, scale, rows_config(matrix, count))


def rows_config(matrix: DeviceMatrix, count: int) -> RowsConfig:
    """What was fastest on an H100 for a matrix of floats and `count` inputs."""
    cols = triton.next_power_of_2(matrix.padded)
    warps = max(1, min(8, cols // 1024))
    return RowsConfig(max(1, min(16, 32 * 32 * warps // cols)), min(4, triton.next_power_of_2(count)), warps)


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
    )


@triton.jit(do_not_specialize=["count"])  # one kernel whatever the number of inputs
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
def _embed_kernel(
    ids: tl.tensor, data: tl.tensor, scales: tl.tensor, minima: tl.tensor, out: tl.tensor, out_stride: tl.tensor,
    scale: tl.tensor,
    COLS: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, BLOCK_G: tl.constexpr,
) -> None:  # fmt: skip
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
