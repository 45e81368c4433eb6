"""Statistics of interleaved runs: medians, and how sure they are. Pure: a seed instead of chance.

Runs of a noisy box drift together, so two contenders are compared within a pair, and the interval is that of the median
over pairs: resampling whole pairs keeps what they share.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, combinations_with_replacement
from statistics import fmean, median

RESAMPLES = 2000
CHANCES = 100


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and the bounds of its 95 % bootstrap interval (percentile method)."""

    median: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


def median_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Bootstrap interval of the median. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values to take a median of")
    rng = random.Random(seed)
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = (1 - confidence) / 2
    last = len(medians) - 1
    return Interval(median(values), medians[round(tail * last)], medians[round((1 - tail) * last)])


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Of the ratios within pairs. Raises ValueError for lists of unequal length, or none."""
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} and {len(denominators)} runs do not make pairs")
    return median_interval([one / other for one, other in zip(numerators, denominators, strict=True)])


def pairwise_interval(values: Sequence[float]) -> Interval:
    """Where values lie that are spread alike to both sides: the median of the means of any two (Hodges and Lehmann),
    and what Wilcoxon's signed ranks leave of them in 95 % (in all that there is to tell, for fewer than six). Almost as
    narrow as a mean's where nothing odd happens, and not moved by what does. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values to tell where they lie")
    count = len(values)
    means = sorted(fmean(two) for two in combinations_with_replacement(values, 2))
    outside = _outside(count)
    return Interval(median(means), means[outside], means[-1 - outside])


def _outside(count: int) -> int:
    """How many means of two are left out on either side: the most that the sum of positive ranks of so many values is
    not above with a chance of at most 2.5 %, counted over all signs; 0 where nothing is as rare."""
    ways = [1]
    for rank in range(1, count + 1):
        ways = [without + with_it for without, with_it in zip(ways + [0] * rank, [0] * rank + ways, strict=True)]
    return max(0, sum(40 * so_far <= 1 << count for so_far in accumulate(ways)) - 1)


def without_chance(times: Sequence[Sequence[float]], chance: Sequence[Sequence[float]]) -> list[list[float]]:
    """The times of runs, rid of what `chance` explains of them: how much of something each met that no contender can
    change (a control variate). Runs of a group are of one contender and one moment.

    What one more costs is the median slope between any two runs of a group (Theil and Sen), over all groups: odd runs
    do not move it, nor does by what contenders or moments differ. From fewer than `CHANCES` nothing is learned: the
    times as they are. Raises ValueError for lists of unequal length.
    """
    groups = [list(zip(*both, strict=True)) for both in zip(chance, times, strict=True)]
    slopes = [
        (other - one) / (more - less)
        for group in groups
        for (less, one), (more, other) in combinations(group, 2)
        if more != less
    ]
    slope = median(slopes) if len(slopes) >= CHANCES else 0.0
    usual = fmean(met for group in groups for met, _ in group)
    return [[time - slope * (met - usual) for met, time in group] for group in groups]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the others do not exceed (nearest rank). Raises ValueError for no values."""
    if not values or not 0 <= share <= 1:
        raise ValueError(f"no percentile {share} of {len(values)} values")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def order_of(contenders: int, pair: int) -> list[int]:
    """Who runs when in a round: forwards in even rounds, backwards in odd ones, so that no one is always first."""
    order = list(range(contenders))
    return order if pair % 2 == 0 else order[::-1]


def bound_tok_s(resident_tok_s: float, bytes_per_token: float, bytes_per_s: float) -> float:
    """Speed if all transfers hid behind compute, or compute behind them."""
    return 1 / max(1 / resident_tok_s, bytes_per_token / bytes_per_s)


def serial_tok_s(resident_tok_s: float, missed_bytes_per_token: float, bytes_per_s: float) -> float:
    """Speed if the step stood still for every missed byte."""
    return 1 / (1 / resident_tok_s + missed_bytes_per_token / bytes_per_s)


def settled_after(intervals: Sequence[float], usual: float, *, tolerance: float = 0.05, window: int = 4) -> int | None:
    """Tokens until the pace is back: the least n such that the median of the `window` intervals from n on is at most
    (1 + tolerance) × `usual`. None where it never is.
    """
    for start in range(len(intervals) - window + 1):
        if median(intervals[start : start + window]) <= (1 + tolerance) * usual:
            return start
    return None
