"""The order "rows", in which GPUs read matrices, as strips are what CPUs read. numpy alone.

A plain matrix `[N, K]` is row after row. A quantised one is padded with zeros to whole blocks of 16 rows; all its data
comes first, then all scales, then all minima, each part padded to 64 bytes. A *segment* is 32 bytes of a row:

    int8          a group of 32 columns: q in -127…127                                     8.5 bits a weight
    fp8           a group of 32 columns: e4m3, times the group's scale                     8.5 bits
    int4, int4s   two groups, columns padded to 64: byte j has column j low, 32 + j high   5 and 4.5 bits

Data lies `[block][segment][row of the block][32]`, scales and minima `[block][group][row of the block]`: a tile of 16
rows and one segment is 512 bytes in a row, for memory and, above all, for reads over a link, which want whole lines.

Values are those of `formats`: the numbers of a quantised matrix do not depend on its order. fp8 has this order alone.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from expertd_engine.kernels.formats import (
    GROUP_COLUMNS,
    LARGEST,
    QUANTISED,
    STRIP_ROWS,
    Bytes,
    Floats,
    packed_bytes,
    quantise,
    strip_bytes,
)

FP8 = "fp8"
ROW_FORMATS = (*QUANTISED, FP8)
"""Quantised formats of this order."""

BLOCK_ROWS = 16
SEGMENT_BYTES = 32
_ALIGNMENT = 64
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_FP8_REACH = 28.0
"""Where a group's largest weight is put, of 448: e4m3 has the same precision there, and scales stay normal float16."""


def row_bytes(format: str, cols: int) -> tuple[int, int]:
    """Bytes of a row's data and of its scales (as of its minima), wherever they lie. ValueError for unknown formats."""
    if format in _ITEM_BYTES:
        return cols * _ITEM_BYTES[format], 0
    if format not in ROW_FORMATS:
        raise ValueError(f"format {format!r} is unknown: allowed are {', '.join((*_ITEM_BYTES, *ROW_FORMATS))}")
    groups = _groups(format, cols)
    return groups * GROUP_COLUMNS // (2 if _is_paired(format) else 1), 2 * groups


def part_offsets(format: str, rows: int, cols: int) -> tuple[int, int, int]:
    """Where data, scales and minima of a matrix begin; -1: it has none."""
    data, scales, _ = _part_ends(format, rows, cols)
    has_scales = format in ROW_FORMATS
    return 0, data if has_scales else -1, scales if format == "int4" else -1


def matrix_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a matrix, padding included."""
    return _part_ends(format, rows, cols)[-1]


def quantise_rows(weights: Floats, format: str, *, threads: int = 1) -> Bytes:
    """float32 `[N, K]` in a quantised format, `matrix_bytes` long. ValueError as for `formats.quantise`."""
    if format == FP8:
        return _quantise_fp8(weights)
    return from_strips(quantise(weights, format, threads=threads), format, *weights.shape)


def from_strips(packed: Bytes, format: str, rows: int, cols: int) -> Bytes:
    """The same matrix in this order. ValueError for a length that is not the matrix'."""
    expected = packed_bytes(format, rows, cols)
    if packed.size != expected:
        raise ValueError(f"{format} [{rows}, {cols}] has {expected} bytes in strips, not {packed.size}")
    strips = packed.reshape(-1, strip_bytes(format, cols))
    groups = -(-cols // GROUP_COLUMNS)
    quads = 4 if _is_paired(format) else 8
    end = groups * quads * 4 * STRIP_ROWS
    q = strips[:, :end].reshape(len(strips), groups, quads, STRIP_ROWS, 4).transpose(0, 3, 1, 2, 4)
    q = q.reshape(len(strips) * STRIP_ROWS, groups, -1)
    halves = [_halves(strips, end + part * groups * 2 * STRIP_ROWS, groups) for part in range(2)]
    return _joined(format, cols, _paired(q) if _is_paired(format) else q ^ np.uint8(128), *halves)


def _joined(format: str, cols: int, data: Bytes, scales: Bytes, minima: Bytes) -> Bytes:
    """The matrix of `[N, …]` parts, N a multiple of a block: bytes, of as many groups as the strips had."""
    rows = len(data)
    whole = np.zeros(matrix_bytes(format, rows, cols), np.uint8)
    data_row, scale_row = row_bytes(format, cols)
    kinds = ((data, data_row, SEGMENT_BYTES), (scales, scale_row, 2), (minima, scale_row, 2))
    for start, (part, width, piece) in zip(part_offsets(format, rows, cols), kinds, strict=True):
        if start >= 0:
            blocks = part.reshape(-1, BLOCK_ROWS, part.size // rows // piece, piece).transpose(0, 2, 1, 3)
            place = whole[start : start + rows * width].reshape(len(blocks), width // piece, BLOCK_ROWS, piece)
            place[:, : blocks.shape[1]] = blocks
    return whole


def _paired(q: Bytes) -> Bytes:
    """`[N, G, 16]`, columns j and 16 + j in a byte, as `[N, ⌈G/2⌉, 32]`, columns j and 32 + j of two groups."""
    columns = np.concatenate([q & 15, q >> 4], axis=2)
    if columns.shape[1] % 2:
        columns = np.concatenate([columns, np.zeros_like(columns[:, :1])], axis=1)
    low, high = columns[:, ::2], columns[:, 1::2]
    joined: Bytes = low | high << np.uint8(4)
    return joined


def _halves(strips: Bytes, begin: int, groups: int) -> Bytes:
    """Scales or minima of strips as bytes `[16·S, 2·G]`."""
    stored = strips[:, begin : begin + groups * 2 * STRIP_ROWS].reshape(len(strips), -1, STRIP_ROWS, 2)
    flat: Bytes = stored.transpose(0, 2, 1, 3).reshape(len(strips) * STRIP_ROWS, -1)
    return flat


def _quantise_fp8(weights: Floats) -> Bytes:
    if not float(np.abs(weights).max()) <= LARGEST:  # also false for NaN
        raise ValueError(f"weights beyond ±{LARGEST:.0f}, or not finite, cannot be quantised")
    rows, cols = weights.shape
    padded = np.zeros((_padded(rows), _groups(FP8, cols) * GROUP_COLUMNS), np.float32)
    padded[:rows, :cols] = weights
    groups = padded.reshape(len(padded), -1, GROUP_COLUMNS)
    scale = (np.abs(groups).max(axis=2, keepdims=True) / np.float32(_FP8_REACH)).astype("<f2")
    steps = scale.astype(np.float32)
    ratio = np.divide(groups, steps, out=np.zeros_like(groups), where=steps != 0)
    return _joined(FP8, cols, _round_fp8(ratio), scale.reshape(len(padded), -1).view(np.uint8), np.zeros(0, np.uint8))


def _round_fp8(values: Floats) -> Bytes:
    """The nearest e4m3, of two the even one."""
    known = _fp8_values()[:127]
    size = np.abs(values)
    above = np.searchsorted(known, size).clip(1, 126)
    low, high = size - known[above - 1], known[above] - size
    code = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above).astype(np.uint8)
    signed: Bytes = code | (np.signbit(values).astype(np.uint8) << np.uint8(7))
    return signed


def _fp8_values() -> Floats:
    """What each e4m3 byte stands for; 0x7f and 0xff are no numbers."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[byte & 127 == 127] = np.nan
    return np.where(byte >= 128, -size, size).astype(np.float32)


def _part_ends(format: str, rows: int, cols: int) -> list[int]:
    data, scales = row_bytes(format, cols)
    parts = (data, scales, scales if format == "int4" else 0)
    stored = _padded(rows) if format in ROW_FORMATS else rows
    return list(accumulate(-(-stored * part // _ALIGNMENT) * _ALIGNMENT for part in parts))


def _padded(rows: int) -> int:
    return -(-rows // BLOCK_ROWS) * BLOCK_ROWS


def _groups(format: str, cols: int) -> int:
    groups = -(-cols // GROUP_COLUMNS)
    return groups + groups % 2 if _is_paired(format) else groups


def _is_paired(format: str) -> bool:
    return format in ("int4", "int4s")
