"""Quantised matrices lie as the kernels read them, whatever their shape, as near the weights as the format allows."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_engine.kernels import formats
from expertd_engine.kernels.formats import QUANTISED, Bytes, Floats, dequantise, packed_bytes, quantise, strip_bytes

SHAPES = [(1, 1), (16, 32), (17, 33), (5, 96), (48, 64), (3, 100), (40, 7)]


def _weights(shape: tuple[int, int], seed: int = 0, scale: float = 0.02) -> Floats:
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return values.astype(np.float32)


def _value(packed: bytes, format: str, cols: int, row: int, col: int) -> float:
    """One weight by the words of the layout alone: byte by byte, in Python's own numbers."""
    groups = (cols + 31) // 32
    per_group = 512 if format == "int8" else 256
    scales = groups * per_group
    length = scales + groups * 32 * (2 if format == "int4" else 1)
    strip = packed[row // 16 * (length + -length % 64) :]
    group, column, lane = col // 32, col % 32, row % 16
    (scale,) = struct.unpack_from("<e", strip, scales + 2 * (16 * group + lane))
    if format == "int8":
        return float(scale * (strip[group * per_group + column // 4 * 64 + lane * 4 + column % 4] - 128))
    byte = strip[group * per_group + column % 16 // 4 * 64 + lane * 4 + column % 4]
    q = byte >> 4 if column >= 16 else byte & 15
    if format == "int4s":
        return float(scale * (q - 8))
    (minimum,) = struct.unpack_from("<e", strip, scales + groups * 32 + 2 * (16 * group + lane))
    return float(scale * q + minimum)


@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_lies_where_the_layout_says(format: str, shape: tuple[int, int]) -> None:
    packed = quantise(_weights(shape), format)
    read = dequantise(packed, format, *shape)
    rows, cols = shape
    slow = [[_value(packed.tobytes(), format, cols, row, col) for col in range(cols)] for row in range(rows)]
    assert read.shape == shape and read.dtype == np.float32
    np.testing.assert_allclose(read, slow, rtol=1e-6)


@pytest.mark.parametrize(("format", "bits"), [("int8", 8.5), ("int4", 5.0), ("int4s", 4.5)])
def test_sizes(format: str, bits: float) -> None:
    assert packed_bytes(format, 64, 128) == 64 * 128 * bits / 8
    assert packed_bytes(format, 49, 97) == packed_bytes(format, 64, 128)
    assert all(strip_bytes(format, cols) % 64 == 0 for cols in (1, 32, 33, 96, 100))


@pytest.mark.parametrize("format", QUANTISED)
def test_padding_is_zero_weights(format: str) -> None:
    read = dequantise(quantise(_weights((17, 33)), format), format, 32, 64)
    assert not read[17:].any()
    if format != "int4":  # there columns of padding take part in their group's range, and meet activations of 0
        assert not read[:, 33:].any()


@st.composite
def _matrices(draw: st.DrawFn) -> Floats:
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 100)))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 500.0]))
    weights = _weights(shape, draw(st.integers(0, 2**32 - 1)), scale)
    return weights + np.float32(draw(st.sampled_from([0.0, 0.5]))) * np.float32(scale)


def _steps(weights: Floats, format: str) -> Floats:
    """The widest step that round to nearest would need in each weight's group."""
    padded = np.zeros((len(weights), -(-weights.shape[1] // 32) * 32), np.float32)
    padded[:, : weights.shape[1]] = weights
    groups = padded.reshape(len(weights), -1, 32)
    reach, span = np.abs(groups).max(-1), groups.max(-1) - groups.min(-1)
    step = {"int8": reach / 127, "int4s": reach / 7, "int4": span / 15}[format]
    return np.asarray(step.repeat(32, axis=1)[:, : weights.shape[1]], np.float32)


@pytest.mark.parametrize("format", QUANTISED)
@settings(max_examples=60, deadline=None)
@given(weights=_matrices())
def test_errors_are_bounded_by_the_step(format: str, weights: Floats) -> None:
    """The mean square in a group is never above that of plain rounding (half a step), float16 being what it is."""
    rows, cols = weights.shape
    error = dequantise(quantise(weights, format), format, rows, cols) - weights
    half = _steps(weights, format) / 2 + np.abs(weights).max() * 2.0**-11 + 2.0**-20
    for begin in range(0, cols, 32):
        group = slice(begin, begin + 32)
        assert (np.sum(error[:, group] ** 2, axis=1) <= 32 * half[:, begin] ** 2).all()


@pytest.mark.parametrize("format", QUANTISED)
def test_neither_threads_nor_pieces_change_a_byte(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _weights((200, 96))
    whole = quantise(weights, format)
    monkeypatch.setattr(formats, "_CHUNK_WEIGHTS", 16 * 96)
    assert np.array_equal(quantise(weights, format), whole)
    assert np.array_equal(quantise(weights, format, threads=3), whole)
    parts = [quantise(weights[begin : begin + 16], format) for begin in range(0, 200, 16)]
    assert np.array_equal(np.concatenate(parts), whole)


def _reference(kind: str, weights: Floats) -> Floats:
    """What ggml's plain quantiser makes of the weights (package `gguf`)."""
    quantiser = gguf.GGMLQuantizationType[kind]
    return np.asarray(gguf.quants.dequantize(gguf.quants.quantize(weights, quantiser), quantiser), np.float32)


@pytest.mark.parametrize(
    ("format", "kind", "share"), [("int8", "Q8_0", 0.92), ("int4", "Q4_1", 0.93), ("int4s", "Q4_0", 0.97)]
)
def test_errors_are_smaller_than_those_of_plain_rounding(format: str, kind: str, share: float) -> None:
    """The root mean square on normally distributed weights; measured 0.89, 0.90 and 0.95 of ggml's."""
    weights = _weights((256, 512))
    ours = dequantise(quantise(weights, format), format, 256, 512) - weights
    theirs = _reference(kind, weights) - weights
    assert np.square(ours).mean() <= share**2 * np.square(theirs).mean()


@pytest.mark.parametrize(("format", "kind"), [("int8", "Q8_0"), ("int4", "Q4_1")])
def test_weights_on_the_same_grid_stay_as_they_are(format: str, kind: str) -> None:
    weights = _reference(kind, _weights((64, 256)))
    read = dequantise(quantise(weights, format), format, 64, 256)
    np.testing.assert_allclose(read, weights, rtol=0, atol=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, 70000.0])
def test_what_float16_cannot_hold_is_refused(value: float) -> None:
    weights = _weights((4, 32))
    weights[1, 1] = value
    with pytest.raises(ValueError, match="beyond ±65504, or not finite"):
        quantise(weights, "int4")


def test_wrong_names_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'int3' is not quantised: allowed are int8, int4, int4s"):
        packed_bytes("int3", 16, 32)
    packed: Bytes = np.zeros(100, np.uint8)
    with pytest.raises(ValueError, match=r"int8 \[16, 32\] has 576 bytes, not 100"):
        dequantise(packed, "int8", 16, 32)
