"""What matrices in row order stand for, read back value by value: the twin of `kernels.row_order`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from expertd_engine.kernels.formats import GROUP_COLUMNS, Bytes, Floats
from expertd_engine.kernels.row_order import BLOCK_ROWS, SEGMENT_BYTES, matrix_bytes, part_offsets, row_bytes


def dequantise_rows(stored: Bytes, format: str, rows: int, cols: int) -> Floats:
    """The float32 `[rows, cols]` that `stored` stands for."""
    assert stored.size == matrix_bytes(format, rows, cols)
    data, scale_row = row_bytes(format, cols)
    padded = -(-rows // BLOCK_ROWS) * BLOCK_ROWS
    raw = _rows_of(stored[: padded * data].reshape(-1, data // SEGMENT_BYTES, BLOCK_ROWS, SEGMENT_BYTES))
    q = _numbers(raw, format).reshape(padded, -1, GROUP_COLUMNS)
    for start, combine in zip(part_offsets(format, rows, cols)[1:], (np.multiply, np.add), strict=True):
        if start >= 0:
            halves = np.ascontiguousarray(stored[start : start + padded * scale_row]).view("<f2")
            q = combine(q, _rows_of(halves.reshape(-1, scale_row // 2, BLOCK_ROWS, 1)).astype(np.float32))
    return np.ascontiguousarray(q.reshape(padded, -1)[:rows, :cols])


def _numbers(raw: Bytes, format: str) -> Floats:
    """Segments `[N, S, 32]` as numbers, before scales and minima."""
    if format in ("int4", "int4s"):
        return np.stack([raw & 15, raw >> 4], axis=2).astype(np.float32) - np.float32(8 if format == "int4s" else 0)
    kind = torch.int8 if format == "int8" else torch.float8_e4m3fn
    numbers: Floats = torch.from_numpy(np.ascontiguousarray(raw)).view(kind).float().numpy()
    return numbers


def _rows_of(blocks: NDArray[Any]) -> NDArray[Any]:
    """`[block, piece, row of the block, …]` as `[row, piece, …]`."""
    return blocks.transpose(0, 2, 1, 3).reshape(-1, blocks.shape[1], blocks.shape[3])
