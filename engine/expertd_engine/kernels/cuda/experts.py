"""Expert FFNs of a few rows each, straight from the records that `resolve` found: two launches a layer.

A record is read once, from wherever it lies, and what lands is written by the program that reads it. A row's result
depends on the row and the weights alone: every product has one order of summation, whatever the batch, and a row's
partials are added in ascending expert id by whichever program finishes a block of outputs last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.experts.store_format import RecordLayout, TensorSpec
from expertd_engine.kernels.cuda.products import multiply, multiply_groups
from expertd_engine.kernels.cuda.resolve import ExpertScratch, TablePointers
from expertd_engine.kernels.row_order import part_offsets, row_bytes

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped")


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel is cut into programs. Results depend on `span` alone, and that only in their last bits."""

    outputs: int
    """Rows of a matrix that a program computes."""
    span: int
    """Bytes of a row that it takes at a time."""
    warps: int
    stages: int
    """Spans under way at once."""


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """What the kernels know of a layer's records. Offsets are bytes from the record's start; -1: there is none."""

    format: str
    """`float32`, `bfloat16`, `int8`, `int4`, `int4s` or `fp8`."""
    hidden: int
    inner: int
    activation: str
    alpha: float
    limit: float
    offsets: tuple[tuple[int, int, int], ...]
    """Of gate, up and down: data, scales, minima."""
    biases: tuple[int, int, int]

    @classmethod
    def of(cls, record: RecordLayout, activation: str, alpha: float, limit: float) -> ExpertLayout:
        """From a store's records and `model.expert_native.find_activation`. ValueError for what no kernel computes."""
        if record.order != "rows":
            raise ValueError(f"records in the order {record.order!r} cannot be read by a GPU: prepare with `--for gpu`")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is unknown: allowed are {', '.join(ACTIVATIONS)}")
        specs = {spec.name: spec for spec in record.tensors}
        formats = {spec.dtype for spec in record.tensors if len(spec.shape) == 2}
        if len(formats) != 1:
            raise ValueError(f"matrices of a record are in several formats: {', '.join(sorted(formats))}")
        hidden, inner = specs["down_proj"].shape
        names = ("gate_proj", "up_proj", "down_proj")
        biases = [specs[f"{name}_bias"].offset if f"{name}_bias" in specs else -1 for name in names]
        offsets = tuple(_parts(specs.get(name)) for name in names)
        return cls(formats.pop(), hidden, inner, activation, alpha, limit, offsets, (biases[0], biases[1], biases[2]))

    @property
    def gated(self) -> bool:
        return self.offsets[0][0] >= 0

    @property
    def quantised(self) -> bool:
        return self.format not in ("float32", "bfloat16")


def _parts(spec: TensorSpec | None) -> tuple[int, int, int]:
    """Where data, scales and minima of a matrix begin in the record; -1: nowhere."""
    if spec is None:
        return -1, -1, -1
    data, scales, minima = part_offsets(spec.dtype, *spec.shape)
    return spec.offset + data, spec.offset + scales, spec.offset + minima


def experts_decode(
    layout: ExpertLayout,
    table: TablePointers,
    x: Tensor,
    weights: Tensor,
    scratch: ExpertScratch,
    out: Tensor,
    *,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> None:
    """Add each row's weighted experts to `out` (float32 `[R, H]`), after `resolve` of its routes.

    `x` `[R, H]` bfloat16 or float32: what the products are computed in, unless the records are float32. `weights`
    float32 `[R, top_k]`.
    """
    gate_up, down = tiles or (decode_tiles(layout, layout.hidden), decode_tiles(layout, layout.inner))
    rows = 16 if len(x) <= 16 else 32
    distinct = len(scratch.address)
    common = (scratch.totals, scratch.begin, scratch.address, scratch.land, scratch.wait, table.ready, scratch.pairs)
    _gate_up_kernel[(triton.cdiv(layout.inner, gate_up.outputs), distinct)](
        *common, x, scratch.inner,
        **_record_constants(layout, gate_up, layout.inner, layout.hidden), TOP_K=scratch.top_k,
        GATE=layout.offsets[0], UP=layout.offsets[1], GATE_BIAS=layout.biases[0], UP_BIAS=layout.biases[1],
        ACTIVATION=layout.activation, ALPHA=layout.alpha, LIMIT=layout.limit,
        MT=rows, num_warps=gate_up.warps, num_stages=gate_up.stages,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(layout.hidden, down.outputs), distinct)](
        *common, scratch.row_pairs, scratch.inner, weights, scratch.partials, scratch.arrived, out,
        **_record_constants(layout, down, layout.hidden, layout.inner), TOP_K=scratch.top_k,
        DOWN=layout.offsets[2], BIAS=layout.biases[2],
        MT=rows, num_warps=down.warps, num_stages=down.stages,
    )  # fmt: skip


def _record_constants(layout: ExpertLayout, tiles: Tiles, outputs: int, cols: int) -> dict[str, Any]:
    data, scale = row_bytes(layout.format, cols)
    return {
        "FORMAT": layout.format,
        "OUTPUTS": outputs,
        "COLS": cols,
        "ROW": data,
        "SCALE_ROW": scale,
        "BN": tiles.outputs,
        "SPAN": tiles.span,
        "STAGES": tiles.stages,
    }


def decode_tiles(layout: ExpertLayout, cols: int) -> Tiles:
    """The cut that was fastest on an H100, for matrices of so many columns."""
    if layout.format == "float32":
        return Tiles(16, 128, 2, 2)
    return _fitting(Tiles(16, 256, 2, 4) if not layout.quantised else Tiles(32, 128, 4, 3), layout, cols)


def _fitting(tiles: Tiles, layout: ExpertLayout, cols: int) -> Tiles:
    """Spans no longer than a row."""
    data, _ = row_bytes(layout.format, cols)
    return replace(tiles, span=min(tiles.span, max(32, triton.next_power_of_2(data))))


@triton.jit
def _gate_up_kernel(
    totals: tl.tensor, begin: tl.tensor, address: tl.tensor, land: tl.tensor, wait: tl.tensor, ready: tl.tensor, pairs: tl.tensor,
    x: tl.tensor, inner: tl.tensor,
    FORMAT: tl.constexpr, OUTPUTS: tl.constexpr, COLS: tl.constexpr, ROW: tl.constexpr, SCALE_ROW: tl.constexpr,
    BN: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, TOP_K: tl.constexpr,
    GATE: tl.constexpr, UP: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, MT: tl.constexpr,
) -> None:  # fmt: skip
    nth = tl.program_id(1)
    if nth >= tl.load(totals):
        return
    first, last = tl.load(begin + nth), tl.load(begin + nth + 1)
    record, target = tl.load(address + nth), tl.load(land + nth)
    wait_for(ready, tl.load(wait + nth))
    GATED: tl.constexpr = GATE[0] >= 0
    output = tl.program_id(0) * BN + tl.arange(0, BN)
    for start in range(first, last, MT):
        pair = start + tl.arange(0, MT)
        live = pair < last
        row = tl.load(pairs + pair, mask=live, other=0) // TOP_K
        rows_of_x = x + row * COLS
        if GATED:
            # Rows of gate and up take turns, so that one product gives both beside each other.
            both = tl.program_id(0) * 2 * BN + tl.arange(0, 2 * BN)
            which, place = both % 2, tl.minimum(both // 2, OUTPUTS - 1)
            at = place * ROW + tl.where(which == 0, GATE[0], UP[0])
            scales = place * SCALE_ROW + tl.where(which == 0, GATE[1], UP[1])
            minima = place * SCALE_ROW + tl.where(which == 0, GATE[2], UP[2])
            acc = product(
                record, target, at, scales, minima, rows_of_x, live, FORMAT, COLS, 2 * BN, SPAN, STAGES, MT,
            )
            gate, up = tl.split(tl.reshape(acc, [MT, BN, 2]))
            gate = with_bias(gate, record, target, output, GATE_BIAS, OUTPUTS)
            up = with_bias(up, record, target, output, UP_BIAS, OUTPUTS)
            result = gated(gate, up, ACTIVATION, ALPHA, LIMIT)
        else:
            place = tl.minimum(output, OUTPUTS - 1)
            up = product(
                record, target, place * ROW + UP[0], place * SCALE_ROW + UP[1], place * SCALE_ROW + UP[2],
                rows_of_x, live, FORMAT, COLS, BN, SPAN, STAGES, MT,
            )  # fmt: skip
            result = activated(with_bias(up, record, target, output, UP_BIAS, OUTPUTS), ACTIVATION)
        mask = live[:, None] & (output[None, :] < OUTPUTS)
        tl.store(inner + pair[:, None] * OUTPUTS + output[None, :], result.to(inner.dtype.element_ty), mask=mask)
        if target != 0:  # what has landed is nearer
            tl.debug_barrier()
            record, target = target, target - target


@triton.jit
def _down_kernel(
    totals: tl.tensor, begin: tl.tensor, address: tl.tensor, land: tl.tensor, wait: tl.tensor, ready: tl.tensor, pairs: tl.tensor,
    row_pairs: tl.tensor, inner: tl.tensor, weights: tl.tensor, partials: tl.tensor, arrived: tl.tensor, out: tl.tensor,
    FORMAT: tl.constexpr, OUTPUTS: tl.constexpr, COLS: tl.constexpr, ROW: tl.constexpr, SCALE_ROW: tl.constexpr,
    BN: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, TOP_K: tl.constexpr,
    DOWN: tl.constexpr, BIAS: tl.constexpr, MT: tl.constexpr,
) -> None:  # fmt: skip
    nth = tl.program_id(1)
    distinct = tl.load(totals)
    if nth >= distinct:
        return
    first, last = tl.load(begin + nth), tl.load(begin + nth + 1)
    record, target = tl.load(address + nth), tl.load(land + nth)
    wait_for(ready, tl.load(wait + nth))
    output = tl.program_id(0) * BN + tl.arange(0, BN)
    place = tl.minimum(output, OUTPUTS - 1)
    for start in range(first, last, MT):
        pair = start + tl.arange(0, MT)
        live = pair < last
        acc = product(
            record, target, place * ROW + DOWN[0], place * SCALE_ROW + DOWN[1], place * SCALE_ROW + DOWN[2],
            inner + pair * COLS, live, FORMAT, COLS, BN, SPAN, STAGES, MT,
        )  # fmt: skip
        acc = with_bias(acc, record, target, output, BIAS, OUTPUTS)
        weight = tl.load(weights + tl.load(pairs + pair, mask=live, other=0), mask=live, other=0.0)
        mask = live[:, None] & (output[None, :] < OUTPUTS)
        tl.store(partials + pair[:, None] * OUTPUTS + output[None, :], acc * weight[:, None], mask=mask)
        if target != 0:
            tl.debug_barrier()
            record, target = target, target - target
    tl.debug_barrier()  # all of the program's partials are written before it says so
    before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
    if before == distinct - 1:
        tl.store(arrived + tl.program_id(0), 0)
        add_partials(row_pairs, partials, out, tl.load(totals + 1), output, OUTPUTS, TOP_K, BN)


@triton.jit
def add_partials(
    row_pairs: tl.tensor, partials: tl.tensor, out: tl.tensor, rows: tl.tensor, output: tl.tensor,
    OUTPUTS: tl.constexpr, TOP_K: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """Add the partials of each of `rows` rows, ascending, to a block of outputs."""
    for start in range(0, rows, 8):
        row = start + tl.arange(0, 8)
        mask = (row < rows)[:, None] & (output < OUTPUTS)[None, :]
        at = out + row[:, None] * OUTPUTS + output[None, :]
        total = tl.load(at, mask=mask, other=0.0)
        for choice in tl.static_range(TOP_K):
            pair = tl.load(row_pairs + row * TOP_K + choice, mask=row < rows, other=0)
            partial = partials + pair[:, None] * OUTPUTS + output[None, :]
            total += tl.load(partial, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(at, total, mask=mask)


@triton.jit
def product(
    record: tl.tensor, target: tl.tensor, rows: tl.tensor, scales: tl.tensor, minima: tl.tensor, x: tl.tensor, live: tl.tensor,
    FORMAT: tl.constexpr, COLS: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    MT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """x W^T for a block of rows of W: float32 `[MT, BN]`. Writes what it reads to `target` unless that is 0."""
    acc = tl.zeros([MT, BN], tl.float32)
    if FORMAT == "float32" or FORMAT == "bfloat16":
        WEIGHT: tl.constexpr = tl.float32 if FORMAT == "float32" else tl.bfloat16
        BK: tl.constexpr = SPAN // (WEIGHT.primitive_bitwidth // 8)
        if target != 0:
            acc = multiply(acc, record, target, rows, x, live, WEIGHT, COLS, BK, STAGES, True)
        else:
            acc = multiply(acc, record, target, rows, x, live, WEIGHT, COLS, BK, STAGES, False)
    else:
        if target != 0:
            acc = multiply_groups(acc, record, target, rows, scales, minima, x, live, FORMAT, COLS, SPAN // 32, STAGES, True)
        else:
            acc = multiply_groups(acc, record, target, rows, scales, minima, x, live, FORMAT, COLS, SPAN // 32, STAGES, False)
    return acc


@triton.jit
def wait_for(ready: tl.tensor, slot: tl.tensor) -> None:
    """Until the slot's bytes are complete; at once for -1. The copy engine goes on while programs wait."""
    if slot >= 0:
        done = tl.atomic_add(ready + slot, 0, sem="acquire", scope="sys")
        while done == 0:
            done = tl.atomic_add(ready + slot, 0, sem="acquire", scope="sys")


@triton.jit
def with_bias(
    acc: tl.tensor, record: tl.tensor, target: tl.tensor, output: tl.tensor, OFFSET: tl.constexpr, OUTPUTS: tl.constexpr
) -> tl.tensor:
    if OFFSET >= 0:
        source = (record + OFFSET).to(tl.pointer_type(tl.float32))
        bias = tl.load(source + output, mask=output < OUTPUTS, other=0.0)
        acc += bias[None, :]
        if target != 0:
            tl.store((target + OFFSET).to(tl.pointer_type(tl.float32)) + output, bias, mask=output < OUTPUTS)
    return acc


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr) -> tl.tensor:
    if KIND == "swiglu_clamped":
        held = tl.minimum(gate, LIMIT)
        return (tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0) * held * sigmoid(ALPHA * held)
    return activated(gate, KIND) * up


@triton.jit
def activated(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == "silu":
        return x * sigmoid(x)
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if KIND == "gelu_tanh":
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    positive = tl.maximum(x, 0.0)
    return positive * positive if KIND == "relu2" else positive


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    return 1.0 / (1.0 + tl.exp(-x))
