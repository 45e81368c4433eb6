"""Experts that the processor computes for a step: the request that the device writes, and the answer that it adds.

Both go through memory that both see (`Mailbox`); a number says that a request is complete, the same number that it is
answered. The device asks before it computes the experts that it has, and looks for the answer after. Nothing on the
host's side of a launch takes part: all this may be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.cuda.products import INTERPRETED
from expertd_engine.kernels.cuda.resolve import ExpertScratch, Left

_COLUMNS = 1024


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


def ask(mailbox: Mailbox, layer: int, x: Tensor, weights: Tensor, scratch: ExpertScratch) -> None:
    """After `resolve` for the host: send rows `x` `[R, H]` with `weights` float32 `[R, top_k]`, if any are missing."""
    rows, hidden = x.shape
    experts, pairs = mailbox.experts, len(scratch.pairs)
    _ask_kernel[(rows,)](
        *(scratch.totals, scratch.experts, scratch.address, scratch.cut, scratch.begin, scratch.pairs, x, weights),
        *(mailbox.sent, mailbox.arrived, mailbox.posted, mailbox.head, experts, mailbox.pairs, mailbox.x),
        *(mailbox.weights, layer, experts.shape[1], pairs),
        HIDDEN=hidden,
        TOP_K=scratch.top_k,
        ROWS=rows,
        WIDTH=triton.next_power_of_2(len(scratch.experts)),
        PAIRS=triton.next_power_of_2(pairs),
        CHOICES=triton.next_power_of_2(scratch.top_k),
        COLUMNS=_COLUMNS,
        num_warps=4,
    )


def collect(mailbox: Mailbox, layer: int, scratch: ExpertScratch, out: Tensor) -> None:
    """Wait for the answer to what this layer has asked, if anything, and add it to `out` float32 `[R, H]`."""
    rows, hidden = out.shape
    _collect_kernel[(rows, triton.cdiv(hidden, _COLUMNS))](
        *(scratch.totals, mailbox.sent, mailbox.done, mailbox.later, mailbox.sums, out, layer),
        HIDDEN=hidden,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["layer"])
def _ask_kernel(
    totals: tl.tensor, distinct: tl.tensor, address: tl.tensor, cuts: tl.tensor, begin: tl.tensor, pairs: tl.tensor,
    x: tl.tensor, weights: tl.tensor, sent: tl.tensor, arrived: tl.tensor, posted: tl.tensor, head: tl.tensor,
    asked: tl.tensor, asked_pairs: tl.tensor, asked_x: tl.tensor, asked_weights: tl.tensor,
    layer: tl.tensor, width: tl.tensor, num_pairs: tl.tensor,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
    CHOICES: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    if tl.load(totals + 2) == 0:
        return
    row, rows = tl.program_id(0), tl.load(totals + 1)
    if row < rows:
        for first in range(0, HIDDEN, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            given = tl.load(x + row * HIDDEN + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
            tl.store(asked_x + row * HIDDEN + column, given, mask=column < HIDDEN)
        choice = tl.arange(0, CHOICES)
        weight = tl.load(weights + row * TOP_K + choice, mask=choice < TOP_K, other=0.0)
        tl.store(asked_weights + row * TOP_K + choice, weight, mask=choice < TOP_K)
    tl.debug_barrier()  # all of the program's part is written before it says so
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="sys") == ROWS - 1:
        tl.store(arrived, 0)
        nth = tl.arange(0, WIDTH)
        met = nth < tl.load(totals)
        cut = tl.load(cuts + nth, mask=met, other=0)
        missing = met & ((tl.load(address + nth, mask=met, other=1) == 0) | (cut > 0))
        place = tl.cumsum(missing.to(tl.int32), 0) - 1
        tl.store(asked + place, tl.load(distinct + nth, mask=missing, other=0), mask=missing)
        tl.store(asked + width + place, tl.load(begin + nth, mask=missing, other=0), mask=missing)
        tl.store(asked + 2 * width + place, tl.load(begin + nth + 1, mask=missing, other=0), mask=missing)
        tl.store(asked + 3 * width + place, cut, mask=missing)
        pair = tl.arange(0, PAIRS)
        tl.store(asked_pairs + pair, tl.load(pairs + pair, mask=pair < num_pairs, other=0), mask=pair < num_pairs)
        tl.store(head, layer)
        tl.store(head + 1, rows)
        tl.store(head + 2, tl.sum(missing.to(tl.int32), 0))
        number = tl.load(sent) + 1
        tl.store(sent, number)
        tl.debug_barrier()
        _tell(posted, number)


@triton.jit(do_not_specialize=["layer"])
def _collect_kernel(
    totals: tl.tensor, sent: tl.tensor, done: tl.tensor, later: tl.tensor, sums: tl.tensor, out: tl.tensor,
    layer: tl.tensor,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    if (tl.load(totals + 2) == 0) | (row >= tl.load(totals + 1)):
        return
    number = tl.load(sent)
    answered = _heard(done)
    missing = tl.load(totals + 3)
    if (missing > 0) & (row == 0) & (tl.program_id(1) == 0):
        tl.store(later + layer, 2 * missing + (answered != number).to(tl.int32))
    while answered != number:
        answered = _heard(done)
    tl.debug_barrier()  # whoever heard it is not alone
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row * HIDDEN + column
    answer = tl.load(sums + at, mask=column < HIDDEN, other=0.0, volatile=True)
    tl.store(out + at, tl.load(out + at, mask=column < HIDDEN, other=0.0) + answer, mask=column < HIDDEN)


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
