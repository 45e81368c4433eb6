"""How a program comes by a record that is not on the card yet: by a copy under way, or by fetching it. Triton functions
alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from expertd_engine.kernels.cuda.products import INTERPRETED

_FETCHING = tl.constexpr(64)
"""Programs that bring a record in, at most: no more than any card runs at once, since they wait for each other."""


@triton.jit
def resolved(
    begin: tl.tensor, address: tl.tensor, land: tl.tensor, wait: tl.tensor, nth: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Of the nth expert, whether there is one or not: its first pair, their end, its record, where that lands, the slot
    to wait for. Volatile, or the compiler would read some of it behind the branches that others decide: this is to be
    one way to memory and back."""
    first, last = tl.load(begin + nth, volatile=True), tl.load(begin + nth + 1, volatile=True)
    record, target = tl.load(address + nth, volatile=True), tl.load(land + nth, volatile=True)
    return first, last, record, target, tl.load(wait + nth, volatile=True)


@triton.jit
def fetch(
    record: tl.tensor, target: tl.tensor, fetched: tl.tensor, part: tl.tensor, parts: tl.tensor, NBYTES: tl.constexpr
) -> None:
    """Program `part` of the `parts` of an expert, the first of which bring its record of NBYTES into a slot: back when
    all of it is there.

    Those first ones wait for each other, which ends because programs begin in the order of their numbers, they follow
    one another, and there is room for all of them: whoever runs beside them waits for nobody that comes later. In the
    interpreter each runs to its end before the next, and brings in all.
    """
    PIECE: tl.constexpr = 2048  # int64: as much as a program has under way at once
    parts = tl.minimum(parts, _FETCHING)
    if INTERPRETED:
        part, parts = part - part, parts - parts + 1
    source, slot = record.to(tl.pointer_type(tl.int64)), target.to(tl.pointer_type(tl.int64))
    tl.multiple_of(source, 16)
    tl.multiple_of(slot, 16)
    brings = (part < parts).to(tl.int32)
    for first in range(part * PIECE, NBYTES // 8 * brings, parts * PIECE):
        at = first + tl.arange(0, PIECE)
        tl.store(slot + at, tl.load(source + at, mask=at < NBYTES // 8), mask=at < NBYTES // 8)
    tl.debug_barrier()  # all of the program's share is written before it says so
    there = tl.atomic_add(fetched, brings, sem="acq_rel") + brings
    while there < parts:
        there = tl.atomic_add(fetched, 0, sem="acquire")


@triton.jit
def landed(record: tl.tensor, target: tl.tensor) -> tl.tensor:
    """Where further rows read from, and land to: what has landed is nearer, and lands no more."""
    if target != 0:
        tl.debug_barrier()
        record, target = target, target - target
    return record, target


@triton.jit
def wait_for(ready: tl.tensor, slot: tl.tensor) -> None:
    """Until the slot's bytes are complete; at once for -1. The copy engine goes on while programs wait."""
    if slot >= 0:
        done = tl.atomic_add(ready + slot, 0, sem="acquire", scope="sys")
        while done == 0:
            done = tl.atomic_add(ready + slot, 0, sem="acquire", scope="sys")
