"""Random weights made directly in the bytes of a stored format, as fast as a disk takes them. numpy alone.

Nothing is drawn as float and rounded: bits are random where the format has a sign, a mantissa or a step, and constant
where it has a scale, so that weights lie around ±0.02, as after a model's initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from expertd_engine.kernels.formats import GROUP_COLUMNS, QUANTISED, STRIP_ROWS, Bytes, packed_bytes, strip_bytes
from expertd_engine.kernels.row_order import BLOCK_ROWS, FP8, from_strips, matrix_bytes, part_offsets

SCALE = 0.02
"""Root mean square of the weights, about."""


@dataclass(frozen=True, slots=True)
class _Bits:
    """A plain number as bits: their type, those that are random, and those that are set."""

    kind: np.dtype[Any]
    random: int
    fixed: int


_PLAIN = {
    "bfloat16": _Bits(np.dtype("<u2"), 0x80FF, 0x3C00),
    "float32": _Bits(np.dtype("<u4"), 0x80FFFFFF, 0x3C000000),
}
"""Random are sign, mantissa and the lowest bit of the exponent: ±2⁻⁷ to ±2⁻⁵."""
_FP8 = _Bits(np.dtype("u1"), 0x8F, 0x30)
"""Likewise in e4m3: ±0.5 to ±1.875."""
_FP8_SIZE = 1.159
"""Root mean square of those."""
_STEP = {"int8": SCALE / 73.3, "int4": SCALE / 4.61, "int4s": SCALE / 4.61}
"""Scale of a group: `SCALE` over the standard deviation of its evenly distributed steps."""
_MIDDLE = 7.5


def stored_bytes(dtype: str, rows: int, cols: int) -> int:
    """Bytes of a `[rows, cols]` matrix stored as `dtype`: `float32`, `bfloat16` or a quantised format."""
    return packed_bytes(dtype, rows, cols) if dtype in QUANTISED else rows * cols * _PLAIN[dtype].kind.itemsize


def random_matrix(dtype: str, rows: int, cols: int, rng: np.random.Generator) -> Bytes:
    """A `[rows, cols]` matrix of random weights, `stored_bytes` long."""
    return _quantised(dtype, rows, cols, rng) if dtype in QUANTISED else _plain(dtype, rows * cols, rng)


def random_rows(format: str, rows: int, cols: int, rng: np.random.Generator) -> Bytes:
    """A `[rows, cols]` matrix of random weights in a quantised format, in the order of `kernels.row_order`."""
    if format != FP8:
        return from_strips(random_matrix(format, rows, cols, rng), format, rows, cols)
    if rows % BLOCK_ROWS or cols % GROUP_COLUMNS:
        raise ValueError(f"random fp8 weights need rows in multiples of {BLOCK_ROWS} and columns of {GROUP_COLUMNS}")
    _, scales, _ = part_offsets(format, rows, cols)
    stored = random_bytes(matrix_bytes(format, rows, cols), rng) & np.uint8(_FP8.random) | np.uint8(_FP8.fixed)
    stored[scales:].view("<f2")[:] = SCALE / _FP8_SIZE
    return stored


def constant(dtype: str, count: int, value: float) -> Bytes:
    """`count` equal numbers in a plain format."""
    bits = int(np.float32(value).view(np.uint32))
    kind = _PLAIN[dtype].kind
    repeated: Bytes = np.full(count, bits >> 16 if kind.itemsize == 2 else bits, kind).view(np.uint8)
    return repeated


def _plain(dtype: str, count: int, rng: np.random.Generator) -> Bytes:
    form = _PLAIN[dtype]
    words = random_bytes(count * form.kind.itemsize, rng).view(form.kind)
    words &= form.kind.type(form.random)
    words |= form.kind.type(form.fixed)
    stored: Bytes = words.view(np.uint8)
    return stored


def _quantised(dtype: str, rows: int, cols: int, rng: np.random.Generator) -> Bytes:
    if cols % GROUP_COLUMNS:
        raise ValueError(f"random {dtype} weights need columns in multiples of {GROUP_COLUMNS}, not {cols}")
    groups = cols // GROUP_COLUMNS
    strips = -(-rows // STRIP_ROWS)
    packed = random_bytes(packed_bytes(dtype, rows, cols), rng).reshape(strips, strip_bytes(dtype, cols))
    data = groups * STRIP_ROWS * GROUP_COLUMNS // (1 if dtype == "int8" else 2)
    if dtype == "int8":
        np.maximum(packed[:, :data], 1, out=packed[:, :data])  # q is stored as q + 128 and never -128
    packed[:, data:] = 0
    real = np.arange(strips * STRIP_ROWS).reshape(strips, 1, STRIP_ROWS) < rows  # weights of padding rows are 0
    scales = [_STEP[dtype]] if dtype != "int4" else [_STEP[dtype], -_MIDDLE * _STEP[dtype]]
    for nth, value in enumerate(scales):
        halves = np.broadcast_to(np.where(real, value, 0.0), (strips, groups, STRIP_ROWS)).astype("<f2")
        begin = data + nth * groups * 2 * STRIP_ROWS
        packed[:, begin : begin + groups * 2 * STRIP_ROWS] = halves.reshape(strips, -1).view(np.uint8)
    return packed.reshape(-1)


def random_bytes(count: int, rng: np.random.Generator) -> Bytes:
    """`count` random bytes."""
    words: Bytes = rng.integers(0, 2**64, -(-count // 8), dtype=np.uint64, endpoint=False).view(np.uint8)
    return words[:count]
