"""The native kernels under test: matrices in every format, and the same sums in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expertd_engine.kernels import formats, library
from expertd_engine.kernels.library import FORMATS, ExpertLayout, Matrix, Pool
from expertd_engine.kernels.row_order import from_strips

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

MISSING = library.why_missing()
needs_kernels = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
AVAILABLE = [] if MISSING else library.load().available
instruction_sets = pytest.mark.parametrize("instruction_set", AVAILABLE or ["none"])
every_format = pytest.mark.parametrize("format", FORMATS)


def native_pool(threads: int) -> Pool:
    """A pool on the best instruction set; the test is skipped where there are no native kernels."""
    if MISSING is not None:
        pytest.skip(str(MISSING))  # says why: no compiler at installation, or switched off
    return Pool(library.load(), threads)


@contextmanager
def pool_on(instruction_set: str, threads: int = 2) -> Iterator[Pool]:
    """A pool whose calls run on that instruction set; afterwards the best one is in use again."""
    kernels = library.load()
    kernels.use(instruction_set)
    try:
        with Pool(kernels, threads) as pool:
            yield pool
    finally:
        kernels.use("")


def scratch_bytes(pool: Pool) -> int:
    """What the pool keeps for its calls; 0 once it is closed."""
    query = pool.library.handle.expertd_pool_scratch_bytes
    query.argtypes, query.restype = [ctypes.c_void_p], ctypes.c_int64
    size: int = query(pool.address)
    return size


def aligned(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Their bytes, copied to a multiple of 64."""
    content = np.frombuffer(values.tobytes(), np.uint8)
    room = np.zeros(content.size + 64, np.uint8)
    copied = room[-room.ctypes.data % 64 :][: content.size]
    copied[:] = content
    return copied


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Packed:
    """A matrix in a format, what it stands for, and a bound of its terms (int4's d·q and m may nearly cancel)."""

    format: str
    data: NDArray[np.uint8]
    values: Floats
    magnitudes: Doubles

    def matrix(self, bias: Floats | None = None) -> Matrix:
        address = None if bias is None else bias.ctypes.data
        return Matrix(self.data.ctypes.data, address, FORMATS[self.format], *self.values.shape)


def pack(weights: Floats, format: str) -> Packed:
    data: NDArray[Any]
    if format == "float32":
        data, values = weights, weights
    elif format == "bfloat16":
        data = (weights.view(np.uint32) >> 16).astype(np.uint16)
        values = (data.astype(np.uint32) << 16).view(np.float32)
    else:
        data = formats.quantise(weights, format)
        values = formats.dequantise(data, format, *weights.shape)
    magnitudes = np.abs(values.astype(np.float64))
    if format == "int4":
        magnitudes = magnitudes + 2 * magnitudes.max()
    return Packed(format, aligned(data), values, magnitudes)


def as_read(x: Floats, format: str) -> Doubles:
    """The inputs as kernels of that format see them: int8 in groups of 32, or as they are."""
    if not format.startswith("int"):
        return x.astype(np.float64)
    rows, cols = x.shape
    padded = np.zeros((rows, -(-cols // 32) * 32), np.float32)
    padded[:, :cols] = x
    groups = padded.reshape(rows, -1, 32)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    steps = np.rint(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0))
    seen: Doubles = (steps.astype(np.float64) * scale).reshape(rows, -1)[:, :cols]
    return seen


def matmul(pool: Pool, matrix: Matrix, x: Floats) -> Floats:
    y = np.empty((len(x), matrix.rows), np.float32)
    pool.matmul(matrix, x.ctypes.data, len(x), y.ctypes.data)
    return y


@dataclass(frozen=True)
class Experts:
    """Experts' records, and their tensors as they stand for."""

    layout: ExpertLayout
    format: str
    records: list[NDArray[np.uint8]]
    tensors: list[dict[str, Floats]]

    @property
    def addresses(self) -> Any:
        return library.record_addresses([record.ctypes.data for record in self.records])


def make_experts(
    rng: np.random.Generator,
    count: int,
    hidden: int,
    inner: int,
    format: str,
    activation: str = "silu",
    *,
    gated: bool = True,
    biases: bool = True,
    alpha: float = 1.7,
    limit: float = 1.0,
    order: str = "strips",
    cut: int = 0,
) -> Experts:
    """The same tensors in either order of records. What neurons before `cut` give, and the bias of down, are zeros."""
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    if not gated:
        del shapes["gate"]
    made, offsets = [], dict.fromkeys(("gate", "up", "down", "gate_bias", "up_bias", "down_bias"), -1)
    for _ in range(count):
        weights = {name: normal(rng, *shape) / np.float32(shape[1] ** 0.5) for name, shape in shapes.items()}
        weights["down"][:, :cut] = 0.0
        packed = {name: pack(matrix, format) for name, matrix in weights.items()}
        tensors = {name: matrix.values for name, matrix in packed.items()}
        parts = {name: _ordered(matrix, order) for name, matrix in packed.items()}
        for name, shape in shapes.items() if biases else ():
            tensors[f"{name}_bias"] = normal(rng, shape[0]) / np.float32(10) * (name != "down" or not cut)
            parts[f"{name}_bias"] = tensors[f"{name}_bias"].view(np.uint8)
        made.append((_record(parts, offsets), tensors))
    layout = ExpertLayout(hidden, inner, FORMATS[format], library.ACTIVATIONS[activation], alpha, limit, **offsets)
    layout.order = library.ORDERS[order]
    return Experts(layout, format, [record for record, _ in made], [tensors for _, tensors in made])


def _ordered(matrix: Packed, order: str) -> NDArray[np.uint8]:
    if order == "strips" or matrix.format not in formats.QUANTISED:
        return matrix.data
    return from_strips(matrix.data, matrix.format, *matrix.values.shape)


def _record(parts: dict[str, NDArray[np.uint8]], offsets: dict[str, int]) -> NDArray[np.uint8]:
    """The parts one after another at multiples of 64; where each lies goes into `offsets`."""
    end = 0
    for name, part in parts.items():
        offsets[name] = end
        end += -(-part.size // 64) * 64
    record = aligned(np.zeros(end, np.uint8))
    for name, part in parts.items():
        record[offsets[name] :][: part.size] = part
    return record


@dataclass(frozen=True)
class Routes:
    """Which rows each expert serves, and with what weight."""

    begin: NDArray[np.int32]
    row: NDArray[np.int32]
    weight: Floats


def make_routes(rng: np.random.Generator, experts: int, tokens: int, top_k: int) -> Routes:
    """Each token to `top_k` experts."""
    chosen = np.stack([np.sort(rng.permutation(experts)[:top_k]) for _ in range(tokens)])
    rows = [np.flatnonzero((chosen == expert).any(axis=1)) for expert in range(experts)]
    begin = np.cumsum([0, *map(len, rows)])
    row = np.concatenate(rows)
    return Routes(begin.astype(np.int32), row.astype(np.int32), rng.random(len(row)).astype(np.float32))


def run_moe(pool: Pool, experts: Experts, x: Floats, routes: Routes) -> Floats:
    """The direct form, onto zeros."""
    out = np.zeros_like(x)
    _moe(pool, experts, x, routes, out=out.ctypes.data)
    return out


def run_partials(pool: Pool, experts: Experts, x: Floats, routes: Routes) -> Floats:
    """Every pair's share of its token, `[pairs, hidden]`."""
    partials = np.full((len(routes.row), x.shape[1]), np.nan, np.float32)
    _moe(pool, experts, x, routes, partials=partials.ctypes.data)
    return partials


def _moe(pool: Pool, experts: Experts, x: Floats, routes: Routes, **result: int) -> None:
    where = (routes.begin.ctypes.data, routes.row.ctypes.data, routes.weight.ctypes.data)
    pool.moe(experts.layout, x.ctypes.data, len(x), experts.addresses, *where, **result)
