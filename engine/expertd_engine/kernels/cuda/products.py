"""Products of a few rows with a block of a stored matrix: what all expert kernels are made of. Triton functions alone.

A matrix lies as `kernels.row_order` says. Its block is some of its rows, `[BN]`, each given by where it
begins, so that rows of two matrices of a record (gate and up) can be one block. Products are of bfloat16 on tensor
cores, or of float32 where the rows or the matrix are; sums are float32, over columns in one order whatever the rows: a
row's bits do not depend on what is computed beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels: it has no arithmetic in bfloat16."""


@triton.jit
def multiply(
    acc: tl.tensor, record: tl.tensor, target: tl.tensor, rows: tl.tensor, x: tl.tensor, live: tl.tensor,
    until: tl.tensor,
    WEIGHT: tl.constexpr, COLS: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, LAND: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`acc` `[MT, BN]` plus x W^T for a plain matrix, whose rows begin at `rows` (bytes) of `record` (an address).

    `x` `[MT]` points at rows, of which those not `live` count as zeros. Columns from `until` on are left out; some are
    read all the same, and must be zeros in `x`. LAND: what is read is written to `target` too.
    """
    source = record.to(tl.pointer_type(WEIGHT))
    tl.multiple_of(source, 16)
    begin = rows // (WEIGHT.primitive_bitwidth // 8)
    for first in tl.range(0, until, BK, num_stages=STAGES):
        col = first + tl.arange(0, BK)
        at = begin[:, None] + col[None, :]
        if COLS % BK == 0:
            w = tl.load(source + at)
            a = tl.load(x[:, None] + col[None, :], mask=live[:, None], other=0.0)
        else:
            w = tl.load(source + at, mask=col[None, :] < COLS, other=0.0)
            a = tl.load(x[:, None] + col[None, :], mask=live[:, None] & (col[None, :] < COLS), other=0.0)
        if LAND:
            landed = target.to(tl.pointer_type(WEIGHT))
            tl.multiple_of(landed, 16)
            tl.store(landed + at, w, mask=col[None, :] < COLS)
        acc = dot(a, w, acc)
    return acc


@triton.jit
def multiply_groups(
    acc: tl.tensor, record: tl.tensor, rows: tl.tensor, scales: tl.tensor, minima: tl.tensor,
    x: tl.tensor, live: tl.tensor, until: tl.tensor,
    FORMAT: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """As `multiply` without LAND, for a quantised matrix; `scales` and `minima` say where those of each row begin, in
    float16.

    A segment is 32 bytes of a row: a group of int8 or fp8, or two groups of 4 bits, one in the low half of each byte.
    Whole numbers are multiplied and groups scaled: products are exact, and scaling costs one operation a group. In 16
    rows a segment of each follows the other (`kernels.row_order`).
    """
    source = record.to(tl.pointer_type(tl.uint8))
    tl.multiple_of(source, 16)
    PAIRED: tl.constexpr = FORMAT == "int4" or FORMAT == "int4s"
    PER_SEGMENT: tl.constexpr = 2 if PAIRED else 1
    SEGMENTS: tl.constexpr = (COLS + 32 * PER_SEGMENT - 1) // (32 * PER_SEGMENT)
    GROUPS: tl.constexpr = SEGMENTS * PER_SEGMENT
    byte = tl.arange(0, 32)
    for first in tl.range(0, (until + 32 * PER_SEGMENT - 1) // (32 * PER_SEGMENT), UNROLL, num_stages=STAGES):
        for step in tl.static_range(UNROLL):
            at = rows[:, None] + (first + step) * 512 + byte[None, :]
            stored = ((first + step) * 32 + byte)[None, :] < SEGMENTS * 32
            w = tl.load(source + at) if SEGMENTS % UNROLL == 0 else tl.load(source + at, mask=stored, other=0)
            for half in tl.static_range(PER_SEGMENT):
                group = (first + step) * PER_SEGMENT + half
                q = nibbles(w, half, FORMAT) if PAIRED else whole_bytes(w, FORMAT)
                col = group * 32 + byte
                a = tl.load(x[:, None] + col[None, :], mask=live[:, None] & (col[None, :] < COLS), other=0.0)
                acc += dot(a, q, tl.zeros_like(acc)) * halves(record, scales, group, GROUPS)[None, :]
                if FORMAT == "int4":
                    sums = dot(a, ones_like_nibbles(w), tl.zeros_like(acc))
                    acc += sums * halves(record, minima, group, GROUPS)[None, :]
    return acc


@triton.jit
def halves(record: tl.tensor, begin: tl.tensor, group: tl.tensor, GROUPS: tl.constexpr) -> tl.tensor:
    """Scales or minima of a group of each row, float32 `[BN]`. 16 rows' lie beside each other."""
    source = record.to(tl.pointer_type(tl.float16))
    tl.multiple_of(source, 16)
    at = tl.max_contiguous(tl.multiple_of(begin + group * 16, 16), 16)
    here = tl.zeros_like(begin) + group < GROUPS
    return tl.load(source + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def whole_bytes(w: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Bytes of int8 or fp8 as bfloat16, which holds either exactly."""
    if FORMAT == "fp8":
        return w.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(tl.bfloat16)
    elif INTERPRETED:
        return w.to(tl.int8, bitcast=True).to(tl.float32).to(tl.bfloat16)
    else:
        return w.to(tl.int8, bitcast=True).to(tl.bfloat16)


@triton.jit
def nibbles(w: tl.tensor, half: tl.constexpr, FORMAT: tl.constexpr) -> tl.tensor:
    """The low or high halves of bytes as bfloat16: q of int4, q - 8 of int4s.

    Put under the exponent of 128 a nibble is the number 128 + q: no conversion, and the subtraction is exact.
    """
    bits = w.to(tl.uint16)
    q = (bits >> 4) if half == 1 else (bits & 15)
    zero: tl.constexpr = 0.0 if FORMAT == "int4" else 8.0
    if INTERPRETED:
        return (q.to(tl.float32) - zero).to(tl.bfloat16)
    else:
        return (q | 0x4300).to(tl.bfloat16, bitcast=True) - (zero + 128.0)


@triton.jit
def ones_like_nibbles(w: tl.tensor) -> tl.tensor:
    """Ones in the place of weights: with them a product sums rows of `x`, and the result lies as the others do.

    Made from the bytes, so that the compiler lays both operands out alike and loads `x` ahead for both.
    """
    if INTERPRETED:
        return tl.full(w.shape, 1.0, tl.bfloat16)
    else:
        return ((w.to(tl.uint16) >> 8) | 0x3F80).to(tl.bfloat16, bitcast=True)


@triton.jit
def dot(a: tl.tensor, w: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """`acc` plus a W^T: tensor cores where both are bfloat16, else float32 throughout."""
    if a.dtype == tl.bfloat16 and w.dtype == tl.bfloat16 and not INTERPRETED:
        return tl.dot(a, tl.trans(w), acc)
    else:
        return tl.dot(a.to(tl.float32), tl.trans(w.to(tl.float32)), acc, input_precision="ieee")
