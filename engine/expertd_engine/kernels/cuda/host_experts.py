"""Experts that the processor computes for a step: the request that the device writes, and the answer that it adds.

Both go through memory that both see (`Mailbox`); a number says that a request is complete, and the same number stands
beside each sum of its answer: whoever reads a sum knows at once whether it is there, with no second way over the link.
The device asks while it begins with the experts that it has, and looks for the answer after: in programs of the
experts' own kernels, since a launch takes longer than either. Nothing on the host's side of a launch takes part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.cuda.products import INTERPRETED
from expertd_engine.kernels.cuda.resolve import ExpertScratch, Left


@dataclass(frozen=True, slots=True)
class Mailbox:
    """What device and processor share: tensors in host memory that the device reads and writes in place; and what is
    the device's own."""

    posted: Tensor
    """int32 `[1]`: the number of the last request."""
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
    """int64 `[R, H]`: the answer, of each row's weighted sum the float32 in the low half, its request's number in the
    high one."""
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


@dataclass(frozen=True, slots=True)
class Asking:
    """A layer of which the processor computes what is left to it, and where it is asked."""

    mailbox: Mailbox
    layer: int


def request_of(asking: Asking | None, scratch: ExpertScratch, weights: Tensor | None) -> tuple[Any, ...]:
    """What `post_request` is given beyond what kernels know; nothing where nobody is asked."""
    if asking is None:
        return (*(None,) * 10, 0, 0, 0, 0)
    box = asking.mailbox
    pointers = (box.sent, box.arrived, box.posted, box.head, box.experts, box.pairs, box.x, box.weights)
    numbers = (asking.layer, box.experts.shape[1], len(scratch.pairs), scratch.max_rows)
    return (weights, scratch.experts, *pointers, *numbers)


def answer_of(asking: Asking | None) -> tuple[Any, ...]:
    """Likewise, for `add_answer`."""
    if asking is None:
        return (*(None,) * 3, 0)
    box = asking.mailbox
    return (box.sent, box.later, box.sums, asking.layer)


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
    asks, rows, met, number = tl.load(totals + 2), tl.load(totals + 1), tl.load(totals), tl.load(sent) + 1
    if asks != 0:
        choice = tl.arange(0, CHOICES)
        for row in range(part, rows, parts):
            weight = tl.load(weights + row * TOP_K + choice, mask=choice < TOP_K, other=0.0)
            for first in range(0, HIDDEN, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                given = tl.load(x + row * HIDDEN + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
                tl.store(asked_x + row * HIDDEN + column, given, mask=column < HIDDEN)
            tl.store(asked_weights + row * TOP_K + choice, weight, mask=choice < TOP_K)
        is_last = parts == 1
        if parts > 1:
            tl.debug_barrier()  # all of the program's part is written before it says so
            is_last = tl.atomic_add(arrived, 1, sem="acq_rel", scope="sys") == parts - 1
        if is_last:
            tl.store(arrived, 0)
            count = 0
            for first in range(0, met, TOGETHER):
                nth = first + tl.arange(0, TOGETHER)
                here = nth < met
                cut, record = tl.load(cuts + nth, mask=here, other=0), tl.load(address + nth, mask=here, other=1)
                expert = tl.load(distinct + nth, mask=here, other=0)
                start, end = tl.load(begin + nth, mask=here, other=0), tl.load(begin + nth + 1, mask=here, other=0)
                missing = here & ((record == 0) | (cut > 0))
                at = asked + count + tl.cumsum(missing.to(tl.int32), 0) - 1
                tl.store(at, expert, mask=missing)
                tl.store(at + width, start, mask=missing)
                tl.store(at + 2 * width, end, mask=missing)
                tl.store(at + 3 * width, cut, mask=missing)
                count += tl.sum(missing.to(tl.int32), 0)
            for first in range(0, num_pairs, TOGETHER):
                pair = first + tl.arange(0, TOGETHER)
                given = tl.load(pairs + pair, mask=pair < num_pairs, other=0)
                tl.store(asked_pairs + pair, given, mask=pair < num_pairs)
            tl.store(head, layer)
            tl.store(head + 1, rows)
            tl.store(head + 2, count)
            tl.store(sent, number)
            tl.debug_barrier()
            _tell(posted, number)


@triton.jit
def look(words: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """What the processor has answered with, as far as it has: see `Mailbox.sums`."""
    return tl.load(words, mask=mask, other=0, volatile=True)


@triton.jit
def add_answer(
    asks: tl.tensor, word: tl.tensor, number: tl.tensor, note: tl.tensor, later: tl.tensor, sums: tl.tensor,
    out: tl.tensor, rows: tl.tensor, output: tl.tensor, OUTPUTS: tl.constexpr,
) -> None:  # fmt: skip
    """Where the layer asks anybody: wait for the answer to request `number`, and add it to a block of `out` float32
    `[R, OUTPUTS]`, to which the program has just added. `word`: a first look at row 0. `note`: what is left in `later`,
    + 1 if that was too early; 0: nothing is."""
    if asks != 0:
        tl.debug_barrier()  # who added before was not alone
        mask = output < OUTPUTS
        if note > 0:
            tl.store(later, note + (_absent(word, number, mask) > 0).to(tl.int32))
        for row in range(0, rows):
            at = row * OUTPUTS + output
            if row > 0:
                word = look(sums + at, mask)
            while _absent(word, number, mask) > 0:
                word = look(sums + at, mask)
            answer = (word & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
            tl.store(out + at, tl.load(out + at, mask=mask, other=0.0) + answer, mask=mask)


@triton.jit
def _absent(word: tl.tensor, number: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """How many of the words are not of that answer yet."""
    return tl.sum((mask & ((word >> 32).to(tl.int32) != number)).to(tl.int32), 0)


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
