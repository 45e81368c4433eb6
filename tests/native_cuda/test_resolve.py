"""Routes resolved on the device: what a plain twin of dicts and lists says, for any routes and any table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from expertd_engine.kernels.cuda.resolve import AGAIN, FAR, NEVER, ExpertScratch, Left, TablePointers, resolve
from support.interpreter import DEVICE

import torch  # isort: skip

EXPERTS, TOP_K, ROWS, SLOTS, RING = 5, 2, 5, 6, 4
LAUNCH = 3 << 14
"""Any number."""
RESIDENT, READ, WAITED, LANDED, LEFT, SHARED = range(6)


@dataclass(frozen=True)
class Case:
    routes: list[list[int]]
    real: int
    far: frozenset[int]
    moving: dict[int, int]
    """Expert to the slot that a copy brings it to."""
    ready: frozenset[int]
    free: list[int]
    taken: int
    """Slots taken from the ring before."""
    left: list[list[int]] | None
    """To the processor, of so many missing; and from where on of one more."""
    again: frozenset[int] = frozenset()
    """Missed of late."""
    steps: int = 0
    """Before this one."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    routes = draw(st.lists(st.permutations(range(EXPERTS)).map(lambda one: one[:TOP_K]), min_size=1, max_size=ROWS))
    slots = draw(st.permutations(range(SLOTS)))
    moving = draw(st.sets(st.integers(0, EXPERTS - 1), max_size=2))
    return Case(
        routes,
        draw(st.integers(0, len(routes))),
        draw(st.frozensets(st.integers(0, EXPERTS - 1))),
        {expert: slots[4 + nth] for nth, expert in enumerate(sorted(moving))},
        draw(st.frozensets(st.sampled_from(slots))),
        slots[: draw(st.integers(0, 4))],
        draw(st.sampled_from([0, 3, 2**31 - 1])),
        draw(st.none() | st.tuples(*(splits(n) for n in range(EXPERTS + 1))).map(list)),
        draw(st.frozensets(st.integers(0, EXPERTS - 1))),
        draw(st.sampled_from([0, 5, 1000])),
    )


def splits(missing: int) -> st.SearchStrategy[list[int]]:
    return st.tuples(st.integers(0, missing), st.sampled_from([0, 64, 128])).map(list)


def address(expert: int) -> int:
    return 4096 * (expert + 1)


def slot_address(slot: int) -> int:
    return 4096 * (slot + 101)


def table_of(case: Case) -> TablePointers:
    entries = torch.zeros(1, EXPERTS, 2, dtype=torch.int64)
    for expert in range(EXPERTS):
        entries[0, expert, 0] = address(expert) | (FAR if expert in case.far else 0)
        entries[0, expert, 1] = case.moving.get(expert, -1) + 1
    ring = torch.full((RING,), -7, dtype=torch.int32)
    for nth, slot in enumerate(case.free):
        ring[(case.taken + nth) % RING] = slot
    counts = torch.tensor([case.taken, case.taken + len(case.free)]).int()  # the second may wrap
    ready = torch.tensor([slot in case.ready for slot in range(SLOTS)]).int()
    where = torch.tensor([slot_address(slot) for slot in range(SLOTS)])
    entries, where, ready, ring, counts = (one.to(DEVICE) for one in (entries, where, ready, ring, counts))
    seen = torch.zeros(1, EXPERTS, 4, dtype=torch.int32, device=DEVICE)
    progress = torch.zeros(1, dtype=torch.int32)
    return TablePointers(
        *(entries, where, ready, ring, counts[:1].clone(), counts[1:].clone(), seen),
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
        progress.pin_memory() if DEVICE == "cuda" else progress,
        torch.full((1,), LAUNCH, dtype=torch.int32, device=DEVICE),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
@example(Case([[0, 1]], 1, frozenset({0, 1}), {}, frozenset(), [2], 0, None))  # one slot for two that are missing
@example(Case([[0, 1]], 1, frozenset({0}), {}, frozenset(), [2], 0, [[0, 64]] * 6, frozenset({0})))  # a lone one again
def test_routes_are_resolved_as_the_twin_says(case: Case) -> None:
    table = table_of(case)
    scratch = ExpertScratch.of(
        hidden=8, inner=8, max_rows=ROWS, top_k=TOP_K, num_experts=EXPERTS, dtype=torch.float32, device=DEVICE
    )
    num_rows = torch.tensor([case.real], dtype=torch.int32, device=DEVICE)
    left = None if case.left is None else left_of(case)
    resolve(table, 0, torch.tensor(case.routes, device=DEVICE), num_rows, scratch, left=left)

    pairs = sorted(
        (expert, row, choice)
        for row, chosen in enumerate(case.routes[: case.real])
        for choice, expert in enumerate(chosen)
    )
    counts = Counter(expert for expert, _, _ in pairs)
    free, (on_cpu, shared, told) = list(case.free), left_to_processor(case, counts)
    expected, where, lands, waits, cuts = [], [], [], [], []
    for expert in sorted(counts):
        source, slot, at, wait = RESIDENT, -1, address(expert), -1
        if expert in case.moving:
            at = slot_address(case.moving[expert])
            if case.moving[expert] not in case.ready:
                source, wait = WAITED, case.moving[expert]
        elif expert in on_cpu:
            source, at = LEFT, 0
        elif expert in shared:
            source = SHARED
        elif expert in case.far:
            source = READ
            if free:
                source, slot = LANDED, free.pop(0)
        expected.append([expert, source, shared.get(expert, slot), counts[expert]])
        where.append(at)
        lands.append(slot_address(slot) if slot >= 0 else 0)
        waits.append(wait)
        cuts.append(shared.get(expert, 0))
    distinct = len(counts)
    assert table.seen[0, : int(table.seen_count[0])].tolist() == expected
    assert scratch.totals.tolist() == [distinct, case.real, len(on_cpu) + len(shared), told]
    assert scratch.address[:distinct].tolist() == where
    assert scratch.land[:distinct].tolist() == lands
    assert scratch.wait[:distinct].tolist() == waits
    assert scratch.cut[:distinct].tolist() == cuts
    if left is not None:
        missed = {e for e in counts if e in case.far and e not in case.moving}
        assert int(left.clock) == case.steps + 1
        assert left.missed[0].tolist() == [
            case.steps + 1 if e in missed else missed_at(case, e) for e in range(EXPERTS)
        ]
    assert scratch.pairs[: len(pairs)].tolist() == [row * TOP_K + choice for _, row, choice in pairs]
    begins = [sum(counts[other] for other in counts if other < expert) for expert in sorted(counts)]
    assert scratch.begin[: distinct + 1].tolist() == [*begins, len(pairs)]
    for row in range(case.real):
        assert scratch.row_pairs[row].tolist() == [nth for nth, (_, owner, _) in enumerate(pairs) if owner == row]
    assert (int(table.head) - case.taken) % 2**32 == len(case.free) - len(free)
    assert int(table.progress) == LAUNCH + 1


def missed_at(case: Case, expert: int) -> int:
    """The last moment that is late enough, or the first that is not."""
    last = case.steps + 1 - AGAIN
    return last if expert in case.again else NEVER if expert % 2 else last - 1


def left_of(case: Case) -> Left:
    missed = [missed_at(case, expert) for expert in range(EXPERTS)]
    splits, last, clock = (
        torch.tensor(one, dtype=torch.int32, device=DEVICE) for one in ([case.left], [missed], [case.steps])
    )
    return Left(splits, last, clock)


def left_to_processor(case: Case, met: Mapping[int, int]) -> tuple[set[int], dict[int, int], int]:
    """In turns, who was missed of late last; and how many are missing, if all is as the table says."""
    missing = [expert for expert in sorted(met) if expert in case.far and expert not in case.moving]
    if case.left is None or not missing:
        return set(), {}, 0
    whole, cut = case.left[len(missing)]
    kinds = [[e for e in missing if e not in case.again], [e for e in missing if e in case.again]]
    offset, order = (case.steps + 1) % 8, []  # 8: a power of two
    for kind in kinds:
        turns = {(nth + offset) % len(kind): e for nth, e in enumerate(kind)}
        order += [turns[turn] for turn in range(len(kind))]
    if cut and whole + 1 == len(missing) and order[whole] in case.again:
        return set(order[:whole]), {}, 0
    return set(order[:whole]), {order[whole]: cut} if cut and whole < len(order) else {}, len(missing)
