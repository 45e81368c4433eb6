"""Quantised matrices: how the kernels want them to lie, how they are made and how they are read back. numpy alone.

A matrix `[N, K]` (y = W x) is padded with zeros to N' = ⌈N/16⌉·16 rows and K' = ⌈K/32⌉·32 columns. A *group* is 32
columns of one row: it has one float16 scale d and, in int4, one float16 minimum m. A *strip* is 16 rows, contiguous and
padded to 64 bytes: data, then scales `[group][row]`, then minima `[group][row]`.

    int8    d·q, q in -127…127           data `[group][8][16 rows][4]`, bytes q + 128                  8.5 bits a weight
    int4    d·q + m, q in 0…15           data `[group][4][16 rows][4]`; byte (j, row, i) holds column  5 bits
    int4s   d·(q - 8), q in 0…15         4j + i of the group low, column 16 + 4j + i high              4.5 bits

So 64 bytes are four columns of 16 rows (eight in the 4-bit formats): one vector of the widest instruction set.

Scales and minima are searched for the least squared error. In 4 bits weight w of a group counts √(mean w² + w²): large
weights matter more than their number. On the demo that is worth 2 % of perplexity against plain least squares.
The weighting is llama.cpp's (`quantize_row_q4_0_impl`), the search is not.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

GROUP_COLUMNS = 32
STRIP_ROWS = 16
STRIP_ALIGNMENT = 64
QUANTISED = ("int8", "int4", "int4s")
"""Names of the quantised formats, as the user and the store have them."""
LARGEST = 65504.0
"""Largest float16: what a scale or a minimum can hold."""

_CHUNK_WEIGHTS = 1 << 16
"""Weights quantised at a time: the search passes over them again and again, so they should stay in the cache."""
_INT8_REACHES = range(126, 111, -1)
"""Steps from zero at which the group's largest weight is tried, besides 127: a tenth less error, and a third less where
weights come from a coarser grid, as the demo's do, which one of these meets well."""
_SYMMETRIC_REACHES = (-8.0, -7.0, -7.25, -7.5, -7.75, -8.25, -8.5, -9.0, 6.5, 6.75, 7.0, 7.25, 7.5, 8.0)
"""Steps from zero at which the group's largest weight is tried. Llama.cpp's Q4_0 always puts it at -8."""
_AFFINE_CUTS = (0.0, 0.5, 1.0, 1.5)
"""Steps cut off at the lower and the upper end of the group's range, in all pairs. None at both is llama.cpp's Q4_1."""
_REFINEMENTS = 3


@dataclass(frozen=True, slots=True)
class _Groups:
    """M groups quantised: `q` `[32, M]`, whole numbers; scale and minimum `[M]`, already rounded to float16."""

    q: Floats
    scale: Floats
    minimum: Floats | None
    error: Floats
    """Of each group: sum of squared errors, in the 4-bit formats weighted by importance."""


def packed_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a `[rows, cols]` matrix in a quantised format."""
    return -(-rows // STRIP_ROWS) * strip_bytes(format, cols)


def strip_bytes(format: str, cols: int) -> int:
    """Bytes of one strip of 16 rows. Raises ValueError for an unknown format."""
    data, minima = _bytes_of_group(format)
    return _round_up(_groups(cols) * (data + (2 if minima else 1) * 2 * STRIP_ROWS), STRIP_ALIGNMENT)


def quantise(weights: Floats, format: str, *, threads: int = 1) -> Bytes:
    """float32 `[N, K]` in the kernels' layout, `packed_bytes` long. The same bytes for every number of threads.

    Raises ValueError for numbers that are not finite or too large for a float16 scale.
    """
    rows, cols = weights.shape
    packed = np.zeros((-(-rows // STRIP_ROWS), strip_bytes(format, cols)), np.uint8)
    step = max(1, _CHUNK_WEIGHTS // max(1, STRIP_ROWS * cols))

    def fill(first: int) -> None:
        strips = packed[first : first + step]
        _pack(strips, _fit(format, _as_groups(weights[first * STRIP_ROWS :][: len(strips) * STRIP_ROWS])), format, cols)

    _for_each(fill, range(0, len(packed), step), threads)
    return packed.reshape(-1)


def dequantise(packed: Bytes, format: str, rows: int, cols: int) -> Floats:
    """The float32 `[rows, cols]` that `packed`, in the kernels' layout, stands for. Raises ValueError for its length.

    Strips are independent: a slice of whole strips is the matrix of those rows.
    """
    expected = packed_bytes(format, rows, cols)
    if packed.size != expected:
        raise ValueError(f"{format} [{rows}, {cols}] has {expected} bytes, not {packed.size}")
    strips = packed.reshape(-1, strip_bytes(format, cols))
    out = np.empty((len(strips) * STRIP_ROWS, _groups(cols) * GROUP_COLUMNS), np.float32)
    step = max(1, _CHUNK_WEIGHTS // max(1, STRIP_ROWS * cols))
    for first in range(0, len(strips), step):
        values = _unpack(strips[first : first + step], format, cols)
        out[first * STRIP_ROWS :][: len(values)] = values
    return out[:rows, :cols]


def _as_groups(weights: Floats) -> Floats:
    """`[N, K]` as `[32, M]`, padded: the groups of each row in order, one a column."""
    rows, cols = weights.shape
    padded = weights
    if rows % STRIP_ROWS or cols % GROUP_COLUMNS:
        padded = np.zeros((_round_up(rows, STRIP_ROWS), _groups(cols) * GROUP_COLUMNS), np.float32)
        padded[:rows, :cols] = weights
    return np.ascontiguousarray(padded.reshape(-1, GROUP_COLUMNS).T, np.float32)


def _fit(format: str, weights: Floats) -> _Groups:
    if not float(np.abs(weights).max()) <= LARGEST:  # also false for NaN
        raise ValueError(f"weights beyond ±{LARGEST:.0f}, or not finite, cannot be quantised")
    if format == "int8":
        return _fit_int8(weights)
    squares = weights * weights
    importance: Floats = np.sqrt(squares.mean(axis=0) + squares)
    return (_fit_affine if format == "int4" else _fit_symmetric)(weights, importance)


def _fit_int8(weights: Floats) -> _Groups:
    """The largest weight at ±127 or a little below: of several scales, the one with the least squared error."""
    largest = np.abs(weights).max(axis=0)
    best = _round_symmetric(weights, None, _half(largest / np.float32(127)), -127, 127)
    for reach in _INT8_REACHES:
        best = _better(best, _round_symmetric(weights, None, _half(largest / np.float32(reach)), -127, 127))
    return best


def _fit_symmetric(weights: Floats, importance: Floats) -> _Groups:
    """Of several scales, the one with the least error, then least squares for its steps."""
    low, high = weights.min(axis=0), weights.max(axis=0)
    largest = np.where(high > -low, high, low)
    best = _round_symmetric(weights, importance, _half(largest / np.float32(_SYMMETRIC_REACHES[0])), -8, 7)
    for reach in _SYMMETRIC_REACHES[1:]:
        best = _better(best, _round_symmetric(weights, importance, _half(largest / np.float32(reach)), -8, 7))
    for _ in range(_REFINEMENTS):
        heavy = best.q * importance
        scale = _ratio((heavy * weights).sum(axis=0), (heavy * best.q).sum(axis=0))
        best = _better(best, _round_symmetric(weights, importance, _half(scale), -8, 7))
    return best


def _fit_affine(weights: Floats, importance: Floats) -> _Groups:
    """Of several ranges, the one with the least error, then least squares for its steps.

    The whole range is tried first and kept unless another is better: weights that are on such a grid stay as they are.
    """
    low, high = weights.min(axis=0), weights.max(axis=0)
    step = (high - low) / np.float32(15)
    best: _Groups | None = None
    for below, above in product(_AFFINE_CUTS, repeat=2):
        minimum = low + np.float32(below) * step
        scale = (high - np.float32(above) * step - minimum) / np.float32(15)
        tried = _round_affine(weights, importance, _half(scale), _half(minimum))
        best = tried if best is None else _better(best, tried)
    assert best is not None
    for _ in range(_REFINEMENTS):
        best = _better(best, _round_affine(weights, importance, *_least_squares(weights, importance, best)))
    return best


def _least_squares(weights: Floats, importance: Floats, fitted: _Groups) -> tuple[Floats, Floats]:
    """Scale and minimum that are best for the steps `fitted.q`."""
    total = importance.sum(axis=0)
    mean_q = _ratio((importance * fitted.q).sum(axis=0), total)
    mean_w = _ratio((importance * weights).sum(axis=0), total)
    centred = fitted.q - mean_q
    heavy = importance * centred
    scale = _half(_ratio((heavy * weights).sum(axis=0), (heavy * centred).sum(axis=0)))
    return scale, _half(mean_w - scale * mean_q)


def _round_symmetric(weights: Floats, importance: Floats | None, scale: Floats, least: int, most: int) -> _Groups:
    q = weights * _ratio(np.float32(1), scale)
    np.rint(q, out=q)
    np.clip(q, least, most, out=q)
    return _Groups(q, scale, None, _squares(q * scale - weights, importance))


def _round_affine(weights: Floats, importance: Floats, scale: Floats, minimum: Floats) -> _Groups:
    q = weights - minimum
    q *= _ratio(np.float32(1), scale)
    np.rint(q, out=q)
    np.clip(q, 0, 15, out=q)
    values = q * scale
    values += minimum
    values -= weights
    return _Groups(q, scale, minimum, _squares(values, importance))


def _better(one: _Groups, other: _Groups) -> _Groups:
    """Group by group the one with the smaller error; the first where they are equal."""
    take = other.error < one.error
    minimum = None
    if one.minimum is not None and other.minimum is not None:
        minimum = np.where(take, other.minimum, one.minimum)
    return _Groups(
        np.where(take, other.q, one.q),
        np.where(take, other.scale, one.scale),
        minimum,
        np.where(take, other.error, one.error),
    )


def _squares(errors: Floats, importance: Floats | None) -> Floats:
    """Sums over the groups. Overwrites `errors`."""
    np.multiply(errors, errors, out=errors)
    if importance is not None:
        errors *= importance
    total: Floats = errors.sum(axis=0)
    return total


def _ratio(numerator: Floats | np.float32, denominator: Floats) -> Floats:
    """The quotient; 0 where the denominator is 0, as in a group of zeros."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator != 0)


def _half(values: Floats) -> Floats:
    """Rounded as it will be stored, so that steps are chosen for the scale that the kernel will see."""
    return values.astype(np.float16).astype(np.float32)


def _pack(strips: Bytes, groups: _Groups, format: str, cols: int) -> None:
    """Write fitted groups, in the order of `_as_groups`, into `strips` `[S, strip_bytes]`."""
    shape = (len(strips), STRIP_ROWS, _groups(cols))
    data, has_minima = _bytes_of_group(format)
    end = shape[2] * data
    offset = {"int8": 128, "int4": 0, "int4s": 8}[format]
    q: Bytes = (groups.q + np.float32(offset)).astype(np.uint8)
    if format != "int8":
        q = q[: GROUP_COLUMNS // 2] | q[GROUP_COLUMNS // 2 :] << np.uint8(4)
    columns = q.reshape(-1, 4, *shape).transpose(2, 4, 0, 3, 1)  # [strip, group, quad, row, column]
    strips[:, :end] = columns.reshape(len(strips), end)
    for values in (groups.scale, groups.minimum) if has_minima else (groups.scale,):
        assert values is not None
        halves = np.ascontiguousarray(values.astype("<f2").reshape(shape).transpose(0, 2, 1))
        begin, end = end, end + shape[2] * 2 * STRIP_ROWS
        strips[:, begin:end] = halves.view(np.uint8).reshape(len(strips), -1)


def _unpack(strips: Bytes, format: str, cols: int) -> Floats:
    """The rows of `strips` `[S, strip_bytes]`, all columns of their groups: float32 `[16·S, K']`."""
    count, groups = len(strips), _groups(cols)
    data, has_minima = _bytes_of_group(format)
    end = groups * data
    stored = strips[:, :end].reshape(count, groups, -1, STRIP_ROWS, 4).transpose(0, 3, 1, 2, 4)
    if format != "int8":
        stored = np.concatenate([stored & 15, stored >> 4], axis=3)
    q = stored.reshape(count, STRIP_ROWS, groups, GROUP_COLUMNS).astype(np.float32)
    q -= np.float32({"int8": 128, "int4": 0, "int4s": 8}[format])
    q *= _halves(strips, end, groups)
    if has_minima:
        q += _halves(strips, end + groups * 2 * STRIP_ROWS, groups)
    return q.reshape(count * STRIP_ROWS, -1)


def _halves(strips: Bytes, begin: int, groups: int) -> Floats:
    """Scales or minima of strips, float32 `[S, 16, G, 1]`."""
    stored = np.ascontiguousarray(strips[:, begin : begin + groups * 2 * STRIP_ROWS]).view("<f2")
    values = stored.reshape(len(strips), groups, STRIP_ROWS, 1).transpose(0, 2, 1, 3)
    return values.astype(np.float32)


def _bytes_of_group(format: str) -> tuple[int, bool]:
    """Bytes of data of one group of a strip, and whether the format has minima."""
    if format not in QUANTISED:
        raise ValueError(f"format {format!r} is not quantised: allowed are {', '.join(QUANTISED)}")
    return STRIP_ROWS * GROUP_COLUMNS // (1 if format == "int8" else 2), format == "int4"


def _groups(cols: int) -> int:
    return -(-cols // GROUP_COLUMNS)


def _for_each(work: Callable[[int], None], items: range, threads: int) -> None:
    if threads <= 1 or len(items) <= 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, items))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
