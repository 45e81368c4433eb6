"""Experts that the processor computes for a step: the request that the device writes, and the answer that it adds.

Both go through memory that both see (`Mailbox`); a number says that a request is complete, the same number that it is
answered. The device asks while it begins with the experts that it has, and looks for the answer after: in programs of
the experts' own kernels, since a launch takes longer than either. Nothing on the host's side of a launch takes part.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.cuda.products import INTERPRETED
from expertd_engine.kernels.cuda.resolve import Left


@dataclass(frozen=True, slots=True)
class Mailbox:
    """What device and processor share: tensors in host memory that the device reads and writes in place; and what is
    the device's own."""

    posted: Tensor
    """int32 `[1]`: the number of the last request."""
    done: Tensor
    """int32 `[1]`: of the last answer."""
    head: Tensor
    """int32 `[3]`: layer, rows, experts asked for."""
    experts: Tensor
    """int32 `[4, U]`: who is asked for; where its pairs begin, and end; its first neuron asked for."""
    pairs: Tensor
    """int32 `[P]`: row · top_k + choice, by expert."""
    x: Tensor
    """float32 `[R, H]`: what experts read."""
    weights: Tensor
    """float32 `[R, top_k]`"""
    sums: Tensor
    """float32 `[R, H]`: the answer, each row's weighted sum."""
    sent: Tensor
    """int32 `[1]`, on the device: the number of its last request."""
    arrived: Tensor
    """int32 `[1]`, on the device, 0 between launches: programs that have written their part of a request."""
    left: Left
    later: Tensor
    """int32 `[L]`, host memory: of each layer that was split as `left` says 2 · experts missing, + 1 if the device had
    to wait for the answer; what is not 0 is left there."""
    shares: bool
    """Whether any expert may be shared: else kernels need not look."""


@triton.jit
def post_request(
    totals: tl.tensor, distinct: tl.tensor, address: tl.tensor, cuts: tl.tensor, begin: tl.tensor, pairs: tl.tensor,
    x: tl.tensor, weights: tl.tensor, sent: tl.tensor, arrived: tl.tensor, posted: tl.tensor, head: tl.tensor,
    asked: tl.tensor, asked_pairs: tl.tensor, asked_x: tl.tensor, asked_weights: tl.tensor,
    layer: tl.tensor, width: tl.tensor, num_pairs: tl.tensor, part: tl.tensor, parts: tl.tensor,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr,
) -> None:  # fmt: skip
    """Program `part` of `parts` that send rows `x` `[R, HIDDEN]` with their weights, and who is missing, if anybody is:
    whoever is done last says so."""
    rows = tl.load(totals + 1)
    for row in range(part, rows, parts):
        for first in range(0, HIDDEN, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            given = tl.load(x + row * HIDDEN + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
            tl.store(asked_x + row * HIDDEN + column, given, mask=column < HIDDEN)
        choice = tl.arange(0, CHOICES)
        weight = tl.load(weights + row * TOP_K + choice, mask=choice < TOP_K, other=0.0)
        tl.store(asked_weights + row * TOP_K + choice, weight, mask=choice < TOP_K)
    number = tl.load(sent) + 1
    tl.debug_barrier()  # all of the program's part is written before it says so
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="sys") == parts - 1:
        tl.store(arrived, 0)
        count = 0
        for first in range(0, tl.load(totals), TOGETHER):
            nth = first + tl.arange(0, TOGETHER)
            met = nth < tl.load(totals)
            cut = tl.load(cuts + nth, mask=met, other=0)
            missing = met & ((tl.load(address + nth, mask=met, other=1) == 0) | (cut > 0))
            at = asked + count + tl.cumsum(missing.to(tl.int32), 0) - 1
            tl.store(at, tl.load(distinct + nth, mask=missing, other=0), mask=missing)
            tl.store(at + width, tl.load(begin + nth, mask=missing, other=0), mask=missing)
            tl.store(at + 2 * width, tl.load(begin + nth + 1, mask=missing, other=0), mask=missing)
            tl.store(at + 3 * width, cut, mask=missing)
            count += tl.sum(missing.to(tl.int32), 0)
        for first in range(0, num_pairs, TOGETHER):
            pair = first + tl.arange(0, TOGETHER)
            tl.store(asked_pairs + pair, tl.load(pairs + pair, mask=pair < num_pairs, other=0), mask=pair < num_pairs)
        tl.store(head, layer)
        tl.store(head + 1, rows)
        tl.store(head + 2, count)
        tl.store(sent, number)
        tl.debug_barrier()
        _tell(posted, number)


@triton.jit
def add_answer(
    totals: tl.tensor, sent: tl.tensor, done: tl.tensor, later: tl.tensor, sums: tl.tensor, out: tl.tensor,
    output: tl.tensor, notes: tl.tensor, OUTPUTS: tl.constexpr,
) -> None:  # fmt: skip
    """Wait for the answer to what this layer has asked, if anything, and add it to a block of `out` float32
    `[R, OUTPUTS]`, to which the program has just added. `notes`: whether it says in `later`, of this layer, if it had
    to wait."""
    if tl.load(totals + 2) != 0:
        number = tl.load(sent)
        answered = _heard(done)
        missing = tl.load(totals + 3)
        if notes & (missing > 0):
            tl.store(later, 2 * missing + (answered != number).to(tl.int32))
        while answered != number:
            answered = _heard(done)
        tl.debug_barrier()  # whoever heard it is not alone, nor who added before
        for row in range(0, tl.load(totals + 1)):
            at = row * OUTPUTS + output
            answer = tl.load(sums + at, mask=output < OUTPUTS, other=0.0, volatile=True)
            tl.store(out + at, tl.load(out + at, mask=output < OUTPUTS, other=0.0) + answer, mask=output < OUTPUTS)


@triton.jit
def _tell(flag: tl.tensor, number: tl.tensor) -> None:
    """Write it where the processor looks, after all that was written before. No atomic operation: between two sides of
    a link these are not."""
    if INTERPRETED:
        tl.atomic_xchg(flag, number, sem="release", scope="sys")
    else:
        tl.inline_asm_elementwise(
            "st.release.sys.global.b32 [$1], $2; mov.b32 $0, $2;", "=r,l,r", [flag.to(tl.int64), number],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _heard(flag: tl.tensor) -> tl.tensor:
    """What the processor has written there; all that it wrote before is there too."""
    if INTERPRETED:
        return tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    else:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [flag.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
