"""Matrices in the order that GPUs read: the same numbers as in strips, every byte where the words say."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from expertd_engine.kernels.formats import QUANTISED, Floats, dequantise, quantise
from expertd_engine.kernels.row_order import (
    FP8,
    ROW_FORMATS,
    from_strips,
    matrix_bytes,
    part_offsets,
    quantise_rows,
    row_bytes,
)

import torch  # isort: skip
from support.row_values import dequantise_rows

SHAPES = [(1, 1), (16, 32), (17, 33), (5, 96), (48, 64), (3, 100), (40, 7)]


def _weights(shape: tuple[int, int]) -> Floats:
    return (np.random.default_rng(0).standard_normal(shape) * 0.02).astype(np.float32)


def _value(stored: bytes, format: str, rows: int, cols: int, row: int, col: int) -> float:
    """One weight by the words of the layout alone."""
    paired = format in ("int4", "int4s")
    groups = (cols + 63) // 64 * 2 if paired else (cols + 31) // 32
    segments = groups // 2 if paired else groups
    block, line = divmod(row, 16)
    data = (rows + 15) // 16 * 16 * segments * 32
    group, lane = divmod(col, 32)
    scale_at = data + 2 * (block * groups * 16 + group * 16 + line)
    (scale,) = struct.unpack_from("<e", stored, scale_at)
    segment = group // 2 if paired else group
    byte = stored[block * segments * 512 + segment * 512 + line * 32 + lane]
    if paired:
        q = byte >> 4 if group % 2 else byte & 15
        if format == "int4s":
            return float(scale * (q - 8))
        scales = (rows + 15) // 16 * 16 * groups * 2
        return float(scale * q + struct.unpack_from("<e", stored, scale_at + scales + -scales % 64)[0])
    if format == "int8":
        return float(scale * struct.unpack("<b", bytes([byte]))[0])
    return float(scale * torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("format", ROW_FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_lies_where_the_layout_says(format: str, shape: tuple[int, int]) -> None:
    rows, cols = shape
    stored = quantise_rows(_weights(shape), format)
    assert len(stored) == matrix_bytes(format, *shape)
    slow = [[_value(stored.tobytes(), format, rows, cols, row, col) for col in range(cols)] for row in range(rows)]
    np.testing.assert_allclose(dequantise_rows(stored, format, *shape), slow, rtol=1e-6)


@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_changes_no_number(format: str, shape: tuple[int, int]) -> None:
    strips = dequantise(quantise(_weights(shape), format), format, *shape)
    np.testing.assert_array_equal(dequantise_rows(quantise_rows(_weights(shape), format), format, *shape), strips)


@pytest.mark.parametrize(("format", "bits"), [("int8", 8.5), (FP8, 8.5), ("int4", 5.0), ("int4s", 4.5)])
def test_sizes(format: str, bits: float) -> None:
    assert matrix_bytes(format, 64, 128) == 64 * 128 * bits / 8
    assert matrix_bytes("bfloat16", 64, 128) == 2 * matrix_bytes("int8", 64, 128) * 8 / 8.5
    assert [offset % 64 for offset in part_offsets("int4", 7, 100)] == [0, 0, 0]
    assert part_offsets("float32", 7, 100) == (0, -1, -1) and part_offsets("int8", 7, 100)[2] == -1


def test_fp8_is_rounded_to_the_nearest() -> None:
    weights = _weights((64, 96))
    weights[0, :32], weights[1, 0] = 0, 1e-30
    read = dequantise_rows(quantise_rows(weights, FP8), FP8, 64, 96)
    groups = weights.reshape(64, 3, 32)
    scale = (np.abs(groups).max(axis=2, keepdims=True) / 28).astype(np.float16).astype(np.float32)
    ratio = torch.from_numpy(np.divide(groups, scale, out=np.zeros_like(groups), where=scale != 0))
    nearest = ratio.to(torch.float8_e4m3fn).float().numpy() * scale
    np.testing.assert_array_equal(read, nearest.reshape(64, 96))
    assert np.abs(read - weights).max() / np.abs(weights).max() < 1 / 16


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e6])
def test_weights_that_no_scale_holds_are_refused(bad: float) -> None:
    weights = _weights((2, 32))
    weights[1, 1] = bad
    for format in ROW_FORMATS:
        with pytest.raises(ValueError, match="beyond ±65504"):
            quantise_rows(weights, format)


def test_wrong_lengths_and_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="in strips, not 3"):
        from_strips(np.zeros(3, np.uint8), "int8", 4, 64)
    with pytest.raises(ValueError, match="'int3' is unknown: allowed are float32"):
        row_bytes("int3", 64)
