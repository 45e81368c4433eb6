"""Expert FFNs of a few rows each, straight from the records that `resolve` found: two launches a layer, in which the
processor is asked for what is left to it, too.

A record is read once, from wherever it lies, and what lands is written by the program that reads it. Quantised records
lie in small pieces that a link carries badly as products ask for them: one that lands is brought in first, in long
reads by all programs of its first launch, and multiplied with where it has landed. A row's result depends on the row
and the weights alone: every product has one order of summation, whatever the batch, and a row's partials are added in
ascending expert id by whichever program finishes a block of outputs last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.experts.store_format import RecordLayout, TensorSpec
from expertd_engine.kernels.cuda.expert_blocks import add_partials, down_block, gate_up_block, write_zeros
from expertd_engine.kernels.cuda.expert_records import fetch, landed, resolved, wait_for
from expertd_engine.kernels.cuda.host_experts import (
    Asking,
    add_answer,
    answer_of,
    look,
    post_request,
    request_of,
)
from expertd_engine.kernels.cuda.resolve import ExpertScratch, TablePointers
from expertd_engine.kernels.row_order import part_offsets, row_bytes

_ROWS = 16
"""Pairs of one expert that a program multiplies together, whatever the batch: what tensor cores take at least."""
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
    registers: int | None = None
    """Of a thread, at most: of how many programs a multiprocessor has room for. None: as many as the compiler likes."""


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """What the kernels know of a layer's records. Offsets are bytes from the record's start; -1: there is none."""

    format: str
    """`float32`, `bfloat16`, `int8`, `int4`, `int4s` or `fp8`."""
    nbytes: int
    """Of a record."""
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
        return cls(
            formats.pop(),
            record.bytes,
            hidden,
            inner,
            activation,
            alpha,
            limit,
            offsets,
            (biases[0], biases[1], biases[2]),
        )

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
    layout: ExpertLayout, table: TablePointers, x: Tensor, weights: Tensor, scratch: ExpertScratch, out: Tensor, *,
    shares: bool = False, asking: Asking | None = None,
) -> None:  # fmt: skip
    """Add each row's weighted experts to `out` (float32 `[R, H]`), after `resolve` of its routes.

    `x` `[R, H]` bfloat16 or float32: what the products are computed in, unless the records are float32. `weights`
    float32 `[R, top_k]`. `shares`: of some experts a part alone is computed, as `scratch.cut` says. `asking`: what is
    left to the processor is asked for, waited for and added.
    """
    tiles = [decode_tiles(layout, cols, scratch.top_k) for cols in (layout.hidden, layout.inner)]
    gate_up(layout, table, x, scratch, tiles[0], shares=shares, asking=asking, weights=weights)
    down(layout, table, weights, scratch, out, tiles[1], shares=shares, asking=asking)


def gate_up(
    layout: ExpertLayout, table: TablePointers, x: Tensor, scratch: ExpertScratch, tiles: Tiles, *,
    shares: bool = False, asking: Asking | None = None, weights: Tensor | None = None,
) -> None:  # fmt: skip
    """`scratch.inner` of each pair: the first launch of `experts_decode`. `weights`: for who is asked."""
    programs = len(scratch.address) + (asking is not None)
    _gate_up_kernel[(triton.cdiv(layout.inner, tiles.outputs), programs)](
        *_resolved(table, scratch), scratch.fetched, x, scratch.inner, *request_of(asking, scratch, weights),
        **record_constants(layout, tiles, layout.inner, layout.hidden), TOP_K=scratch.top_k,
        GATE=layout.offsets[0], UP=layout.offsets[1], GATE_BIAS=layout.biases[0], UP_BIAS=layout.biases[1],
        ACTIVATION=layout.activation, ALPHA=layout.alpha, LIMIT=layout.limit,
        FETCHED=layout.nbytes if layout.quantised else 0, MT=_ROWS,
        SHARES=shares, ASKS=asking is not None, CHOICES=triton.next_power_of_2(scratch.top_k),
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip


def down(
    layout: ExpertLayout, table: TablePointers, weights: Tensor, scratch: ExpertScratch, out: Tensor, tiles: Tiles, *,
    shares: bool = False, asking: Asking | None = None,
) -> None:  # fmt: skip
    """From `scratch.inner` to `out`: the second launch of `experts_decode`."""
    _down_kernel[(triton.cdiv(layout.hidden, tiles.outputs), len(scratch.address))](
        *_resolved(table, scratch), scratch.fetched, scratch.row_pairs, scratch.inner, weights, scratch.partials,
        *(scratch.arrived, out),
        *answer_of(asking),
        **record_constants(layout, tiles, layout.hidden, layout.inner), TOP_K=scratch.top_k,
        DOWN=layout.offsets[2], BIAS=layout.biases[2], FETCHES=layout.quantised,
        MT=_ROWS, SHARES=shares, ASKS=asking is not None,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip


def _resolved(table: TablePointers, scratch: ExpertScratch) -> tuple[Tensor, ...]:
    where = (scratch.totals, scratch.begin, scratch.address, scratch.land, scratch.wait, scratch.cut)
    return (*where, table.ready, scratch.pairs)


def record_constants(layout: ExpertLayout, tiles: Tiles, outputs: int, cols: int) -> dict[str, Any]:
    """What a kernel must know of a record's matrices of `outputs` rows and `cols` columns."""
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


def decode_tiles(layout: ExpertLayout, cols: int, width: int = 1) -> Tiles:
    """How matrices of so many columns are cut, where a row goes to `width` experts at most: bfloat16, int8, int4 as was
    fastest of five to ten cuts on an H100. In bfloat16 programs of eight experts' down just fill that card (hidden size
    2,048): eight take 12.7 µs, nine 16.8. With fewer registers more have room: 13.0 and 14.8, of the same bits."""
    is_down = cols == layout.inner
    if layout.format == "float32":
        return _fitting(Tiles(16, 128, 2, 2), layout, cols)
    if layout.format == "bfloat16":
        down = Tiles(32, 256, 2, 3, registers=168 if width > 8 else None)
        return _fitting(down if is_down else Tiles(16, 256, 2, 3), layout, cols)
    span = 32 if layout.format in ("int4", "int4s") else 128
    return _fitting(Tiles(32 if is_down else 16, span, 2, 4), layout, cols)


def _fitting(tiles: Tiles, layout: ExpertLayout, cols: int) -> Tiles:
    """Spans no longer than a row."""
    data, _ = row_bytes(layout.format, cols)
    return replace(tiles, span=min(tiles.span, max(32, triton.next_power_of_2(data))))


@triton.jit(do_not_specialize=["layer", "width", "num_pairs", "most_rows"])
def _gate_up_kernel(
    totals: tl.tensor, begin: tl.tensor, address: tl.tensor, land: tl.tensor, wait: tl.tensor, cuts: tl.tensor,
    ready: tl.tensor, pairs: tl.tensor, fetched: tl.tensor, x: tl.tensor, inner: tl.tensor,
    weights: tl.tensor, distinct: tl.tensor, sent: tl.tensor, asking: tl.tensor, posted: tl.tensor, head: tl.tensor,
    asked: tl.tensor, asked_pairs: tl.tensor, asked_x: tl.tensor, asked_weights: tl.tensor,
    layer: tl.tensor, width: tl.tensor, num_pairs: tl.tensor, most_rows: tl.tensor,
    FORMAT: tl.constexpr, OUTPUTS: tl.constexpr, COLS: tl.constexpr, ROW: tl.constexpr, SCALE_ROW: tl.constexpr,
    BN: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, TOP_K: tl.constexpr,
    GATE: tl.constexpr, UP: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, FETCHED: tl.constexpr, MT: tl.constexpr,
    SHARES: tl.constexpr, ASKS: tl.constexpr, CHOICES: tl.constexpr,
) -> None:  # fmt: skip
    nth = tl.program_id(1)
    if ASKS:
        if nth == 0:
            parts = tl.minimum(tl.num_programs(0), most_rows)
            if tl.program_id(0) < parts:
                post_request(
                    totals, distinct, address, cuts, begin, pairs, x, weights, sent, asking, posted, head,
                    asked, asked_pairs, asked_x, asked_weights, layer, width, num_pairs, tl.program_id(0), parts,
                    COLS, TOP_K, CHOICES, 4096, 64,
                )  # fmt: skip
            return
        nth -= 1
    first, last, record, target, slot = resolved(begin, address, land, wait, nth)
    cut = 0
    if SHARES:
        cut = tl.load(cuts + nth, volatile=True)
    if (nth >= tl.load(totals)) | (record == 0):
        return  # there is no such expert, or the processor computes it
    if SHARES:
        output = tl.program_id(0) * BN + tl.arange(0, BN)
        if (cut > 0) & (tl.program_id(0) * BN >= cut):
            write_zeros(inner, first, last, output, OUTPUTS, MT)  # what is left to the processor
            last = first
    wait_for(ready, slot)
    if FETCHED:
        if target != 0:
            fetch(record, target, fetched + nth, tl.program_id(0), tl.num_programs(0), FETCHED)
        record, target = landed(record, target)
    for start in range(first, last, MT):
        gate_up_block(
            record, target, tl.program_id(0), start, last, pairs, x, inner,
            FORMAT, OUTPUTS, COLS, ROW, SCALE_ROW, BN, SPAN, STAGES, TOP_K,
            GATE, UP, GATE_BIAS, UP_BIAS, ACTIVATION, ALPHA, LIMIT, MT,
        )  # fmt: skip
        record, target = landed(record, target)


@triton.jit(do_not_specialize=["layer"])
def _down_kernel(
    totals: tl.tensor, begin: tl.tensor, address: tl.tensor, land: tl.tensor, wait: tl.tensor, cuts: tl.tensor,
    ready: tl.tensor, pairs: tl.tensor, fetched: tl.tensor, row_pairs: tl.tensor, inner: tl.tensor, weights: tl.tensor,
    partials: tl.tensor, arrived: tl.tensor, out: tl.tensor,
    sent: tl.tensor, later: tl.tensor, sums: tl.tensor, layer: tl.tensor,
    FORMAT: tl.constexpr, OUTPUTS: tl.constexpr, COLS: tl.constexpr, ROW: tl.constexpr, SCALE_ROW: tl.constexpr,
    BN: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, TOP_K: tl.constexpr,
    DOWN: tl.constexpr, BIAS: tl.constexpr, FETCHES: tl.constexpr, MT: tl.constexpr, SHARES: tl.constexpr,
    ASKS: tl.constexpr,
) -> None:  # fmt: skip
    nth, block = tl.program_id(1), tl.program_id(0)
    first, last, record, target, slot = resolved(begin, address, land, wait, nth)
    cut, asks, missing, number = 0, 0, 0, 0
    if SHARES:
        cut = tl.load(cuts + nth, volatile=True)
    if ASKS:
        asks, missing = tl.load(totals + 2, volatile=True), tl.load(totals + 3, volatile=True)
        number = tl.load(sent, volatile=True)
    rows, distinct = tl.load(totals + 1, volatile=True), tl.load(totals)
    if nth >= distinct:
        return
    wait_for(ready, slot)
    if FETCHES:
        record, target = landed(record, target)  # the launch before has brought it in
        if block == 0:
            tl.store(fetched + nth, 0)
    if record == 0:
        write_zeros(partials, first, last, block * BN + tl.arange(0, BN), OUTPUTS, MT)  # the processor's answer counts
        last = first
    until = COLS
    if SHARES:
        until = tl.where(cut > 0, cut, COLS)
    for start in range(first, last, MT):
        down_block(
            record, target, block, start, last, pairs, inner, weights, partials, until,
            FORMAT, OUTPUTS, COLS, ROW, SCALE_ROW, BN, SPAN, STAGES, DOWN, BIAS, MT,
        )  # fmt: skip
        record, target = landed(record, target)
    tl.debug_barrier()  # all of the program's partials are written before it says so
    if tl.atomic_add(arrived + block, 1, sem="acq_rel") == distinct - 1:
        tl.store(arrived + block, 0)
        output = block * BN + tl.arange(0, BN)
        word = tl.zeros([BN], tl.int64)
        if ASKS:
            word = look(sums + output, output < tl.where(asks != 0, OUTPUTS, 0))  # comes while partials are added
        add_partials(row_pairs, partials, out, rows, output, OUTPUTS, TOP_K, BN)
        if ASKS:
            noted = (missing > 0) & (block == tl.num_programs(0) - 1)
            add_answer(asks, word, number, 2 * missing * noted, later + layer, sums, out, rows, output, OUTPUTS)
