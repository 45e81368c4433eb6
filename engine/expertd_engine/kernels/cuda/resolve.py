"""What a layer's routes mean for memory, decided on the device: which distinct experts, read from where, landing where.

One small program a layer, captured in the step's graph. It owns nothing: tables are `TablePointers`', results lie in
`ExpertScratch`. The tables' rules are those of two-phase publication: an entry always names an address that may be
read; bytes under it never change while a launched step may read them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_PAIRS = 1024
"""(row, choice) pairs of one step that `resolve` sorts in one program."""
FAR = 1
"""Bit of an entry's address: the record lies in host memory and is read over the link. Records are page-aligned."""
LANDED = 3
"""The `source` in `seen` of an expert that was read over the link into a slot; 0 resident, 1 read over the link and
dropped, 2 waited for, 4 left to the processor, 5 shared with it."""
AGAIN = 16
"""Steps within which an expert that is missed once more is worth a slot: measured on routes with the persistence of
Qwen3's, where such come again soon, and of those missed once most do not."""
_COMPARED = 32


@dataclass(frozen=True, slots=True)
class TablePointers:
    """The device's words on where experts lie, of L layers with at most E experts. All on the device that computes."""

    entries: Tensor
    """int64 `[L, E, 2]`: the address to read (`FAR` set: host memory); slot + 1 while a copy into it is under way."""
    slot_address: Tensor
    """int64 `[S]`"""
    ready: Tensor
    """int32 `[S]`: whether the slot's bytes are complete."""
    landing: Tensor
    """int32 `[N]`, N a power of two: slots that a step may fill, a ring."""
    head: Tensor
    """int32 `[1]`: slots taken from the ring since the beginning, wrapping."""
    tail: Tensor
    """int32 `[1]`: slots put into it, wrapping."""
    seen: Tensor
    """int32 `[L, U, 4]`: of each distinct expert of the step: expert, source, slot it landed in or -1 (of a shared one,
    its first neuron that the processor computes), pairs."""
    seen_count: Tensor
    """int32 `[L]`"""
    progress: Tensor
    """int32 `[1]`, host memory that the device can write: `launch` and the layers whose routes are known in it."""
    launch: Tensor
    """int32 `[1]`: a number that says which launch this is."""


@dataclass(frozen=True, slots=True)
class Left:
    """What is left to the processor. All on the device."""

    splits: Tensor
    """int32 `[L, U + 1, 2]`: of n experts that a layer misses, how many the processor is asked for, and from which
    neuron on for one more; 0: for none. Rewritten between launches."""
    missed: Tensor
    """int32 `[L, E]`: the step in which each was last missed; `NEVER` at first."""
    clock: Tensor
    """int32 `[1]`: steps since the beginning, wrapping."""


NEVER = -(2**30)


@dataclass(frozen=True, slots=True)
class ExpertScratch:
    """Where `resolve` leaves its results and the expert kernels theirs: for all layers, for at most `max_rows`."""

    top_k: int
    num_experts: int
    max_rows: int
    totals: Tensor
    """int32 `[4]`: distinct experts, real rows, experts among them that the processor computes, or a part of; experts
    that were missing if they were split as the table says, else 0."""
    experts: Tensor
    """int32 `[U]`: the distinct experts, ascending."""
    target: Tensor
    """int32 `[U]`: slot in which each lands; -1: none."""
    begin: Tensor
    """int32 `[U + 1]`: first pair of each distinct expert, ascending."""
    address: Tensor
    """int64 `[U]`: of its record; 0: the processor computes it."""
    land: Tensor
    """int64 `[U]`: where its bytes are to be written too; 0: nowhere."""
    wait: Tensor
    """int32 `[U]`: slot whose `ready` must be waited for; -1: none."""
    cut: Tensor
    """int32 `[U]`: its first neuron that the processor computes, while kernels read those before; 0: it is not shared.
    Written where anything is left to the processor."""
    pairs: Tensor
    """int32 `[P]`: row · top_k + choice, by ascending expert, then row."""
    row_pairs: Tensor
    """int32 `[R, top_k]`: where in `pairs` each row's pairs stand, ascending."""
    inner: Tensor
    """`[P, I]`, of the type that the kernels multiply in."""
    partials: Tensor
    """float32 `[P, H]`: each pair's weighted result."""
    arrived: Tensor
    """int32 `[H]`, zero between launches: programs that have finished a block of outputs."""
    fetched: Tensor
    """int32 `[U]`, zero between layers: programs that have brought in their share of a quantised record that lands."""

    @classmethod
    def of(
        cls,
        *,
        hidden: int,
        inner: int,
        max_rows: int,
        top_k: int,
        num_experts: int,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> ExpertScratch:
        """Room for steps of up to `max_rows` rows. Raises ValueError for more pairs than `resolve` sorts."""
        pairs = max_rows * top_k
        if pairs > LARGEST_PAIRS:
            raise ValueError(
                f"{max_rows} rows of {top_k} experts are {pairs} pairs: at most {LARGEST_PAIRS} are resolved"
            )
        distinct = min(num_experts, pairs)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            top_k=top_k,
            num_experts=num_experts,
            max_rows=max_rows,
            totals=ints(4),
            experts=ints(distinct),
            target=ints(distinct),
            begin=ints(distinct + 1),
            address=torch.zeros(distinct, dtype=torch.int64, device=device),
            land=torch.zeros(distinct, dtype=torch.int64, device=device),
            wait=ints(distinct),
            cut=ints(distinct),
            pairs=ints(pairs),
            row_pairs=ints(max_rows, top_k),
            inner=torch.zeros(pairs, inner, dtype=dtype, device=device),
            partials=torch.zeros(pairs, hidden, device=device),
            arrived=ints(hidden),
            fetched=ints(distinct),
        )


def resolve(
    table: TablePointers, layer: int, top_k_index: Tensor, num_rows: Tensor, scratch: ExpertScratch, *,
    left: Left | None = None,
) -> None:  # fmt: skip
    """Group the pairs of `top_k_index` int `[R, K]` by expert and say where each expert is read from.

    Rows from `num_rows` (int32 `[1]`, on the device) on are padding. Publishes what landed in the layer before, takes
    slots for what is read over the link, writes `seen` and `progress`. `left`: of those that a layer misses some are
    left to the processor, and one may be divided; others each time, but first those that were not missed of late. One
    that was, and would be divided with none beside it read whole, is read whole, or it would be missed for ever. None:
    nobody is left to it.
    """
    rows, top_k = top_k_index.shape
    if top_k != scratch.top_k or rows > scratch.max_rows:
        raise ValueError(f"routes {rows} x {top_k} do not fit a scratch of {scratch.max_rows} x {scratch.top_k}")
    pairs = triton.next_power_of_2(rows * top_k)
    _resolve_kernel[(1,)](
        *(table.entries, table.slot_address, table.ready, table.landing, table.head, table.tail),
        *(table.seen, table.seen_count, table.progress, table.launch, top_k_index, num_rows),
        *(scratch.totals, scratch.experts, scratch.target, scratch.begin, scratch.address, scratch.land, scratch.wait),
        *(scratch.cut, scratch.pairs, scratch.row_pairs),
        *((table.head, table.head, table.head) if left is None else (left.splits, left.missed, left.clock)),
        *(layer, table.entries.shape[1], table.seen.shape[1], table.landing.shape[0]),
        0 if left is None else left.splits.shape[1],
        NUM_EXPERTS=scratch.num_experts,
        EXPERTS=triton.next_power_of_2(scratch.num_experts),
        WIDTH=triton.next_power_of_2(len(scratch.experts)),
        TOP_K=top_k,
        ROWS=rows,
        PAIRS=pairs,
        COMPARED=min(pairs, _COMPARED),
        LEAVES=left is not None,
        AGAIN_WITHIN=AGAIN,
        num_warps=4 if pairs <= 64 else 8,
    )


def publish(table: TablePointers, layer: int, scratch: ExpertScratch) -> None:
    """Point the entries of what landed in `layer` at its slots: for the last layer, which no `resolve` follows."""
    _publish_kernel[(1,)](
        *(table.entries, table.slot_address, scratch.totals, scratch.experts, scratch.target),
        *(layer, table.entries.shape[1]),
        WIDTH=triton.next_power_of_2(len(scratch.experts)),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["layer"])
def _publish_kernel(
    entries: tl.tensor, slot_address: tl.tensor, totals: tl.tensor, distinct: tl.tensor, targets: tl.tensor,
    layer: tl.tensor, experts: tl.tensor, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    _publish(entries, slot_address, totals, distinct, targets, layer, experts, WIDTH)


@triton.jit
def _publish(
    entries: tl.tensor, slot_address: tl.tensor, totals: tl.tensor, distinct: tl.tensor, targets: tl.tensor,
    layer: tl.tensor, experts: tl.tensor, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    nth = tl.arange(0, WIDTH)
    slot = tl.load(targets + nth, mask=nth < tl.load(totals), other=-1)
    expert = tl.load(distinct + nth, mask=slot >= 0, other=0)
    address = tl.load(slot_address + slot, mask=slot >= 0, other=0)
    tl.store(entries + (layer * experts + expert) * 2, address, mask=slot >= 0)


@triton.jit(do_not_specialize=["layer"])
def _resolve_kernel(
    entries: tl.tensor, slot_address: tl.tensor, ready: tl.tensor, landing: tl.tensor, head: tl.tensor, tail: tl.tensor,
    seen: tl.tensor, seen_count: tl.tensor, progress: tl.tensor, launch: tl.tensor, index: tl.tensor,
    num_rows: tl.tensor, totals: tl.tensor, distinct_experts: tl.tensor, targets: tl.tensor, begin: tl.tensor,
    address: tl.tensor, land: tl.tensor, wait: tl.tensor, cuts: tl.tensor, pairs: tl.tensor, row_pairs: tl.tensor,
    splits: tl.tensor, missed: tl.tensor, clock: tl.tensor, layer: tl.tensor, experts: tl.tensor, width: tl.tensor,
    ring: tl.tensor, left_width: tl.tensor,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    PAIRS: tl.constexpr, COMPARED: tl.constexpr, LEAVES: tl.constexpr, AGAIN_WITHIN: tl.constexpr,
) -> None:  # fmt: skip
    if layer > 0:
        _publish(entries, slot_address, totals, distinct_experts, targets, layer - 1, experts, WIDTH)
        tl.debug_barrier()  # the layer before is read before this one is written
    rows, this = tl.minimum(tl.load(num_rows), ROWS), tl.load(launch)
    count = _sort_pairs(index, rows, pairs, row_pairs, NUM_EXPERTS, EXPERTS, TOP_K, PAIRS, COMPARED)
    expert = tl.arange(0, EXPERTS)
    chosen = count > 0
    nth = tl.cumsum(chosen.to(tl.int32), 0) - 1
    distinct = tl.sum(chosen.to(tl.int32), 0)
    tl.store(begin + nth, tl.cumsum(count, 0) - count, mask=chosen)
    tl.store(begin + distinct, rows * TOP_K)
    tl.store(totals, distinct)
    tl.store(totals + 1, rows)

    entry = entries + (layer * experts + expert) * 2
    at = tl.load(entry, mask=chosen, other=0)
    slot = tl.load(entry + 1, mask=chosen, other=0, volatile=True).to(tl.int32) - 1
    moving = slot >= 0
    awaited = moving & (tl.load(ready + slot, mask=moving, other=1, volatile=True) == 0)
    far = chosen & (slot < 0) & ((at & 1) != 0)

    taken = tl.load(head)
    left = far & (expert < 0)  # to the processor: nobody
    shared = left
    if LEAVES:
        now = tl.load(clock) + (layer == 0).to(tl.int32)  # with layer 0 a step begins
        again = _missed_again(far, now, missed + layer * experts + expert, AGAIN_WITHIN)
        left, shared, cut, as_told = _split(far, again, now + layer, splits + layer * left_width * 2, EXPERTS)
        tl.store(cuts + nth, cut, mask=chosen)
        tl.store(totals + 3, as_told)
    tl.store(totals + 2, tl.sum((left | shared).to(tl.int32), 0))
    read = far & ((left | shared) == 0)
    lands, target = _land(read, taken, tl.load(tail) - taken, landing, ring)
    tl.store(head, taken + tl.sum(lands.to(tl.int32), 0))

    from_slot = tl.load(slot_address + slot, mask=moving, other=0)
    tl.store(address + nth, tl.where(moving, from_slot, tl.where(left, 0, at & -2)), mask=chosen)
    tl.store(land + nth, tl.load(slot_address + target, mask=lands, other=0), mask=chosen)
    tl.store(wait + nth, tl.where(awaited, slot, -1), mask=chosen)
    tl.store(distinct_experts + nth, expert, mask=chosen)
    tl.store(targets + nth, target, mask=chosen)
    over_link = tl.where(lands, 3, tl.where(read, 1, tl.where(awaited, 2, 0)))
    source, where = tl.where(left, 4, tl.where(shared, 5, over_link)), target
    if LEAVES:
        where = tl.where(shared, cut, target)
    _report(seen + (layer * width + nth) * 4, expert, source, where, count, chosen)
    tl.store(seen_count + layer, distinct)
    if LEAVES:
        tl.store(clock, now)  # sums of all warps lie between this and its load
    tl.store(progress, this + layer + 1)


@triton.jit
def _land(read: tl.tensor, taken: tl.tensor, free: tl.tensor, landing: tl.tensor, ring: tl.tensor) -> tl.tensor:
    """Who of those read lands, and each one's slot or -1."""
    order = tl.cumsum(read.to(tl.int32), 0) - 1
    lands = read & (order < free)
    return lands, tl.load(landing + ((taken + order) & (ring - 1)), mask=lands, other=-1)


@triton.jit
def _report(
    record: tl.tensor, expert: tl.tensor, source: tl.tensor, where: tl.tensor, count: tl.tensor, chosen: tl.tensor
) -> None:
    tl.store(record, expert, mask=chosen)
    tl.store(record + 1, source, mask=chosen)
    tl.store(record + 2, where, mask=chosen)
    tl.store(record + 3, count, mask=chosen)


@triton.jit
def _missed_again(far: tl.tensor, now: tl.tensor, missed: tl.tensor, WITHIN: tl.constexpr) -> tl.tensor:
    """Who of those `far` was missed of late; and they are missed now."""
    again = far & (now - tl.load(missed, mask=far, other=0) <= WITHIN)
    tl.store(missed, now, mask=far)
    return again


@triton.jit
def _split(
    far: tl.tensor, again: tl.tensor, nth_turn: tl.tensor, splits: tl.tensor, EXPERTS: tl.constexpr
) -> tl.tensor:
    """Who of those `far` is left to the processor, who is shared with it, each expert's first neuron that it computes
    a part of, and how many are missing if all is as the table says, else 0."""
    missing = tl.sum(far.to(tl.int32), 0)
    whole, cut = tl.load(splits + missing * 2), tl.load(splits + missing * 2 + 1)
    offset, once = nth_turn & (EXPERTS - 1), far & (again == 0)
    few = tl.sum(once.to(tl.int32), 0)
    turn_once = (tl.cumsum(once.to(tl.int32), 0) - 1 + offset) % tl.maximum(few, 1)
    turn_again = few + (tl.cumsum(again.to(tl.int32), 0) - 1 + offset) % tl.maximum(missing - few, 1)
    turn = tl.where(again, turn_again, turn_once)
    kept = (cut > 0) & (whole + 1 == missing) & (few <= whole)  # the only one that could stay, and worth it
    cut = tl.where(kept, 0, cut)
    shared = far & (turn == whole) & (cut > 0)
    return far & (turn < whole), shared, tl.where(shared, cut, 0), tl.where(kept, 0, missing)


@triton.jit
def _sort_pairs(
    index: tl.tensor, rows: tl.tensor, pairs: tl.tensor, row_pairs: tl.tensor,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PAIRS: tl.constexpr, COMPARED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Write `pairs` and `row_pairs`; returns how many pairs chose each expert, int32 `[EXPERTS]`.

    Every pair is compared with every other, which needs no memory and for so few is as quick as any sort.
    """
    pair = tl.arange(0, PAIRS)
    real = pair < rows * TOP_K
    mine = tl.load(index + pair, mask=real, other=NUM_EXPERTS).to(tl.int32)
    place = tl.zeros([PAIRS], tl.int32)
    nth_of_row = tl.zeros([PAIRS], tl.int32)
    count = tl.zeros([EXPERTS], tl.int32)
    expert = tl.arange(0, EXPERTS)
    for first in range(0, PAIRS, COMPARED):
        other = first + tl.arange(0, COMPARED)
        theirs = tl.load(index + other, mask=other < rows * TOP_K, other=NUM_EXPERTS).to(tl.int32)
        less = theirs[None, :] < mine[:, None]
        earlier = (theirs[None, :] == mine[:, None]) & (other[None, :] < pair[:, None])
        place += tl.sum((less | earlier).to(tl.int32), 1)
        same_row = (other[None, :] // TOP_K) == (pair[:, None] // TOP_K)
        nth_of_row += tl.sum(((less | earlier) & same_row).to(tl.int32), 1)  # a row may name an expert twice
        count += tl.sum((theirs[None, :] == expert[:, None]).to(tl.int32), 1)
    tl.store(pairs + place, pair, mask=real)
    tl.store(row_pairs + pair // TOP_K * TOP_K + nth_of_row, place, mask=real)
    return tl.where(expert < NUM_EXPERTS, count, 0)
