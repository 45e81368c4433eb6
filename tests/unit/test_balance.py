"""Link and processor come to end at once, on a simulated box: whatever was measured at start, whatever drifts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import fmean

import pytest

from expertd_engine.planning.balance import Balance
from expertd_engine.planning.misses import CUT_NEURONS, Misses, Split

RECORD, INNER, LAYERS = 3_000_000, 768, 24
MISSING = [0.3, 0.4, 0.2, 0.07, 0.03]
"""How many layers miss 0, 1, … experts."""
STEPS, SETTLED = 120, 60


@dataclass(frozen=True)
class Box:
    """Bytes a second of both sides, what a request takes, and how much slower the link is while the processor works."""

    link: float
    cpu: float
    start_s: float
    contention: float = 0.0

    def took(self, missing: int, split: Split, jitter: float = 1.0) -> tuple[float, bool | None]:
        """Seconds of a layer, and whether the processor was later; None: it was not asked."""
        left = split.whole + (1 - split.cut / INNER if split.cut else 0)
        if not left:
            return missing * RECORD / self.link, None
        cpu = (self.start_s + left * RECORD / self.cpu) * jitter
        link = (missing - left) * RECORD / self.link * (1 + self.contention)
        return max(cpu, link), cpu > link

    def best(self) -> float:
        """Seconds of a layer with the best fixed split of each number of missing experts."""
        splits = [
            [Split(w, c) for w in range(n) for c in (0, *range(CUT_NEURONS, INNER, CUT_NEURONS))] for n in range(5)
        ]
        soonest = [min((self.took(n, one)[0] for one in splits[n]), default=0.0) for n in range(5)]
        return sum(share * took for share, took in zip(MISSING, soonest, strict=True))

    def alone(self) -> float:
        return sum(share * n * RECORD / self.link for n, share in enumerate(MISSING))


TOLD = Misses("both", 50e9, 60e9, 20e-6)
SLOW, QUICK = Box(48e9, 30e9, 40e-6, 0.2), Box(50e9, 110e9, 10e-6)


def serve(balance: Balance, box: Box, rng: random.Random) -> float:
    """A step; seconds of a layer."""
    seconds = []
    for missing in rng.choices(range(5), MISSING, k=LAYERS):
        took, late = box.took(missing, balance.splits[RECORD, INNER][missing], rng.uniform(0.95, 1.05))
        seconds.append(took)
        if late is not None:
            balance.met(missing, late=late)
    balance.end_step()
    balance.refresh()
    return fmean(seconds)


def settled(balance: Balance, box: Box) -> float:
    """Seconds of a layer as it misses on average, after some steps: of the splits that were in force."""
    rng, splits = random.Random(1), []
    for step in range(STEPS):
        serve(balance, box, rng)
        if step >= SETTLED:
            splits.append(list(balance.splits[RECORD, INNER]))
    return fmean(sum(MISSING[n] * box.took(n, one[n])[0] for n in range(5)) for one in splits)


def balance_of() -> Balance:
    return Balance(TOLD, [(RECORD, INNER)], 40)


@pytest.mark.parametrize("box", [SLOW, QUICK, Box(50e9, 60e9, 20e-6), Box(50e9, 6e9, 60e-6)])
def test_after_some_steps_a_box_does_as_well_as_with_the_best_fixed_splits(box: Box) -> None:
    took = settled(balance_of(), box)
    assert took <= 1.05 * box.best() and took <= 1.03 * box.alone()


def test_what_drifts_is_followed_both_ways() -> None:
    balance = balance_of()
    for box in (QUICK, SLOW, QUICK):
        assert settled(balance, box) <= 1.05 * box.best()
    assert balance.met_late > 0 < balance.met_early


def test_a_processor_that_was_measured_in_a_bad_moment_is_tried_again() -> None:
    balance = Balance(Misses("both", 50e9, 8e9, 200e-6), [(RECORD, INNER)], 4)
    assert not any(map(any, balance.splits[RECORD, INNER])), "nobody would ask it"
    rng = random.Random(1)
    for _ in range(STEPS):
        serve(balance, QUICK, rng)
    assert settled(balance, QUICK) <= 1.05 * QUICK.best()


def test_who_is_later_is_left_less_and_who_tells_nothing_is_believed_as_at_first() -> None:
    balance = balance_of()
    first, believed = balance.splits[RECORD, INNER][1], balance.cpu_bytes_per_s
    for _ in range(20):
        balance.met(1, late=True)
        balance.end_step()
    assert balance.refresh() and balance.splits[RECORD, INNER][1].cut in (0, *range(first.cut + 1, INNER))
    assert balance.cpu_bytes_per_s < believed == TOLD.cpu_bytes_per_s
    for _ in range(2000):
        balance.end_step()
    assert balance.refresh() and balance.splits[RECORD, INNER][1] == first
    assert balance.cpu_bytes_per_s == pytest.approx(believed, rel=0.01)


def test_many_missing_experts_are_balanced_together() -> None:
    balance = balance_of()
    before = list(balance.splits[RECORD, INNER])
    for _ in range(5):
        balance.met(20, late=True)
        balance.end_step()
    assert [balance.refresh() for _ in range(3)] == [True, True, False], "so many at once"
    moved = [sum(one) - sum(other) for one, other in zip(before, balance.splits[RECORD, INNER], strict=True)]
    assert moved[17] and moved[32], "one class"
