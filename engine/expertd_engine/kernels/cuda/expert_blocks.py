"""What a program does with one expert: a block of its outputs for a few rows. Triton functions alone.

Decode and prefill are made of the same functions; they differ in which program takes what.
"""

from __future__ import annotations

import triton
import triton.language as tl

from expertd_engine.kernels.cuda.products import multiply, multiply_groups


@triton.jit
def gate_up_block(
    record: tl.tensor, target: tl.tensor, block: tl.tensor, start: tl.tensor, last: tl.tensor,
    pairs: tl.tensor, x: tl.tensor, inner: tl.tensor,
    FORMAT: tl.constexpr, OUTPUTS: tl.constexpr, COLS: tl.constexpr, ROW: tl.constexpr, SCALE_ROW: tl.constexpr,
    BN: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, TOP_K: tl.constexpr,
    GATE: tl.constexpr, UP: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, MT: tl.constexpr,
) -> None:  # fmt: skip
    """`inner` of pairs `[start, start + MT)`, as far as `last`, at outputs `[block·BN, + BN)`."""
    pair = start + tl.arange(0, MT)
    live = pair < last
    row = tl.load(pairs + pair, mask=live, other=0) // TOP_K
    rows_of_x = x + row.to(tl.int64) * COLS
    output = block * BN + tl.arange(0, BN)
    if GATE[0] >= 0:
        # One product gives both: of rows of gate, then rows of up.
        both = tl.arange(0, 2 * BN)
        up_half = both // BN
        place = within(block * BN + both - up_half * BN, OUTPUTS, BN)
        scale_place = place_of_row(place, SCALE_ROW // 2, 1, FORMAT)
        acc = product(
            record, target,
            place_of_row(place, ROW, 32, FORMAT) + (up_half * (UP[0] - GATE[0]) + GATE[0]),
            scale_place + (up_half * (UP[1] // 2 - GATE[1] // 2) + GATE[1] // 2),
            scale_place + (up_half * (UP[2] // 2 - GATE[2] // 2) + GATE[2] // 2),
            rows_of_x, live, COLS, FORMAT, COLS, 2 * BN, SPAN, STAGES, MT,
        )  # fmt: skip
        gate, up = tl.split(tl.permute(tl.reshape(acc, [MT, 2, BN]), [0, 2, 1]))
        gate = with_bias(gate, record, target, output, GATE_BIAS, OUTPUTS)
        result = gated(gate, with_bias(up, record, target, output, UP_BIAS, OUTPUTS), ACTIVATION, ALPHA, LIMIT)
    else:
        place = within(output, OUTPUTS, BN)
        up = product(
            record, target, place_of_row(place, ROW, 32, FORMAT) + UP[0],
            place_of_row(place, SCALE_ROW // 2, 1, FORMAT) + UP[1] // 2,
            place_of_row(place, SCALE_ROW // 2, 1, FORMAT) + UP[2] // 2,
            rows_of_x, live, COLS, FORMAT, COLS, BN, SPAN, STAGES, MT,
        )  # fmt: skip
        result = activated(with_bias(up, record, target, output, UP_BIAS, OUTPUTS), ACTIVATION)
    at = inner + pair.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    tl.store(at, result.to(inner.dtype.element_ty), mask=live[:, None] & (output[None, :] < OUTPUTS))


@triton.jit
def down_block(
    record: tl.tensor, target: tl.tensor, block: tl.tensor, start: tl.tensor, last: tl.tensor,
    pairs: tl.tensor, inner: tl.tensor, weights: tl.tensor, partials: tl.tensor, until: tl.tensor,
    FORMAT: tl.constexpr, OUTPUTS: tl.constexpr, COLS: tl.constexpr, ROW: tl.constexpr, SCALE_ROW: tl.constexpr,
    BN: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    DOWN: tl.constexpr, BIAS: tl.constexpr, MT: tl.constexpr,
) -> None:  # fmt: skip
    """Weighted `partials` of pairs `[start, start + MT)`, as far as `last`, at outputs `[block·BN, + BN)`.

    `until`: COLS, or a multiple of 64 from which on `inner` is zeros: what is read for them adds nothing.
    """
    pair = start + tl.arange(0, MT)
    live = pair < last
    output = block * BN + tl.arange(0, BN)
    place = within(output, OUTPUTS, BN)
    acc = product(
        record, target, place_of_row(place, ROW, 32, FORMAT) + DOWN[0],
        place_of_row(place, SCALE_ROW // 2, 1, FORMAT) + DOWN[1] // 2,
        place_of_row(place, SCALE_ROW // 2, 1, FORMAT) + DOWN[2] // 2,
        inner + pair.to(tl.int64) * COLS, live, until, FORMAT, COLS, BN, SPAN, STAGES, MT,
    )  # fmt: skip
    acc = with_bias(acc, record, target, output, BIAS, OUTPUTS)
    weight = tl.load(weights + tl.load(pairs + pair, mask=live, other=0), mask=live, other=0.0)
    at = partials + pair.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    tl.store(at, acc * weight[:, None], mask=live[:, None] & (output[None, :] < OUTPUTS))


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
            pair = tl.load(row_pairs + row * TOP_K + choice, mask=row < rows, other=0).to(tl.int64)
            partial = partials + pair[:, None] * OUTPUTS + output[None, :]
            total += tl.load(partial, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(at, total, mask=mask)


@triton.jit
def write_zeros(
    results: tl.tensor, first: tl.tensor, last: tl.tensor, output: tl.tensor, OUTPUTS: tl.constexpr, MT: tl.constexpr
) -> None:
    """As the results of pairs `[first, last)` at a block of outputs, which are computed elsewhere."""
    for start in range(first, last, MT):
        pair = start + tl.arange(0, MT)
        at = results + pair.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
        tl.store(at, 0.0, mask=(pair < last)[:, None] & (output < OUTPUTS)[None, :])


@triton.jit
def within(output: tl.tensor, OUTPUTS: tl.constexpr, BN: tl.constexpr) -> tl.tensor:
    """Rows that a matrix of `OUTPUTS` rows has: past its end the last one stands in."""
    return output if OUTPUTS % BN == 0 else tl.minimum(output, OUTPUTS - 1)


@triton.jit
def place_of_row(row: tl.tensor, ROW: tl.constexpr, PIECE: tl.constexpr, FORMAT: tl.constexpr) -> tl.tensor:
    """From a part's start to a row of ROW bytes (or numbers), in pieces of PIECE of them among fifteen other rows'."""
    if FORMAT == "float32" or FORMAT == "bfloat16":
        return row * ROW
    else:
        return row // 16 * (16 * ROW) + row % 16 * PIECE


@triton.jit
def product(
    record: tl.tensor, target: tl.tensor, rows: tl.tensor, scales: tl.tensor, minima: tl.tensor,
    x: tl.tensor, live: tl.tensor, until: tl.tensor,
    FORMAT: tl.constexpr, COLS: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    MT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """x W^T for a block of rows of W, up to column `until`: float32 `[MT, BN]`. Writes what it reads to `target` unless
    that is 0, which it is for quantised records: these are fetched whole."""
    acc = tl.zeros([MT, BN], tl.float32)
    if FORMAT == "float32" or FORMAT == "bfloat16":
        WEIGHT: tl.constexpr = tl.float32 if FORMAT == "float32" else tl.bfloat16
        BK: tl.constexpr = SPAN // (WEIGHT.primitive_bitwidth // 8)
        if target != 0:
            acc = multiply(acc, record, target, rows, x, live, until, WEIGHT, COLS, BK, STAGES, True)
        else:
            acc = multiply(acc, record, target, rows, x, live, until, WEIGHT, COLS, BK, STAGES, False)
    else:
        acc = multiply_groups(acc, record, rows, scales, minima, x, live, until, FORMAT, COLS, SPAN // 32, STAGES)
    return acc


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
