"""Which of a row's choices others answer for, and with what weight. Arithmetic alone, for routers that native code does
not know; `kernels/native/substitute.cpp` has the same rule.

One expert in another's place adds the lost one's size and a direction of its own; two that share its weight add a
direction nearer to what most experts agree on. On a fine-grained model that halves the rise of perplexity at a fifth of
the choices substituted, and more than two add little. Where a row loses most of its choices, their substitutes are many
anyway, and one for each does as well: so a row never reads many more experts than it would have chosen. Where all that
it loses weighs little, there is little for another expert to mend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]
Bools: TypeAlias = NDArray[np.bool_]
Int32s: TypeAlias = NDArray[np.int32]

SHARED_BY = 2
"""Held experts that answer for one lost choice, as far as there are so many, and as `num_substitutes` has it."""
SHARED_FROM = 0.125
"""Substituted mass of a row from which on choices are shared. On the sparse export (2,048 tokens; four times and twice
top-k slots): × perplexity, and experts that compute in a layer.

    all   1.0045, 1.0473   8.192, 9.440
    0.10  1.0045, 1.0460   8.192, 9.438
    0.12  1.0066, 1.0462   8.103, 9.287
    1/8   1.0057, 1.0458
    0.13  1.0048, 1.0500   8.056, 9.195
    0.18  1.0042, 1.0538
    0.26  1.0103, 1.0644

Its choices weigh 0.10 to 0.13 each: hardly a row is below a tenth there, while 0.18 has all that lose one choice below
it. Each additional expert costs a card as much as a chosen one.
"""
ROUNDING = np.float32(1e-6)
"""Of a sum of shares: one that is short of a bound by no more is at the bound, in whatever order it was added up."""


@dataclass(frozen=True, slots=True)
class Substituted:
    """Rows among held experts: experts and weights `[T, W]`, W ≥ K, how many of each row's choices were replaced `[T]`,
    and the share of its weight that those had `[T]`."""

    index: Ids
    weights: Floats
    replaced: Ids | Int32s
    mass: Floats


@dataclass(frozen=True, slots=True)
class Asked:
    """What the routers of `n` MoE layers said of `T` rows."""

    chosen: Ids
    weights: Floats
    """Their own choices, `[n, T, K]` both."""
    lengths: Floats
    """Of what they saw, `[n, T]`."""


@dataclass(frozen=True, slots=True)
class Met:
    """What `n` MoE layers did with rows, beside what has been added to a `Tally`."""

    layers: list[int]
    top_k: int
    served: list[list[int]]
    """`[n, 2]`: how many experts computed, and for how many (row, choice) pairs."""
    asked: Callable[[], Asked]
    """Good until the next run."""


def num_substitutes(replaced: Ids | Int32s, mass: Floats, top_k: int, shared_by: int) -> Ids:
    """Held experts that answer for so many of a row's `top_k` choices `[T]` of this substituted mass `[T]`.

    One for each where that is less than `SHARED_FROM`. Else `shared_by` for each as long as that is no more than three
    quarters of top_k, and one for each at least: in a simulation that loses nothing against `shared_by` for each
    whatever their number (perplexity × 1.006 both at twice top-k slots); half of top_k loses 0.8 %.
    """
    shared = np.maximum(replaced, np.minimum(replaced * shared_by, top_k * 3 // 4))
    return np.where(mass + ROUNDING >= SHARED_FROM, shared, replaced).astype(np.int64)


def widest(top_k: int, shared_by: int) -> int:
    """Experts that a row goes to at most."""
    replaced = np.arange(top_k + 1)
    heaviest = np.ones(top_k + 1, np.float32)
    return int((top_k - replaced + num_substitutes(replaced, heaviest, top_k, shared_by)).max())


_TINY = np.finfo(np.float32).tiny


def replaced_choices(weights: Floats, lacking: Bools, limits: Floats) -> tuple[Bools, Floats]:
    """Which choices `[T, K]` are replaced and each row's substituted mass `[T]`: the lightest of those `lacking` whose
    mass together stays within the row's limit `[T]`."""
    lost: Floats = np.where(lacking, weights, 0) / np.maximum(weights.sum(axis=1, keepdims=True), _TINY)
    if limits.min(initial=1) >= 1:
        return lacking, lost.sum(axis=1)
    order = lost.argsort(axis=1, kind="stable")
    ascending = np.take_along_axis(lost, order, axis=1).cumsum(axis=1)
    within = np.empty_like(lacking)
    np.put_along_axis(within, order, (ascending <= limits[:, None] + ROUNDING) | (limits >= 1)[:, None], axis=1)
    replaced = lacking & within
    mass: Floats = np.where(replaced, lost, 0).sum(axis=1)
    return replaced, mass


def with_substitutes(
    chosen: Ids, weights: Floats, replaced: Bools, others: Ids, scores: Floats, wanted: Ids
) -> tuple[Ids, Floats]:
    """Experts and weights `[T, W]`, W ≥ K: the choices `[T, K]` that are not `replaced`, with the weight they had, and
    the best of `others` `[T, K]`, who share in proportion to `scores` what the replaced ones weighed.

    As many of them as are `wanted` `[T]`, as far as they score above 0; at least as many must as are replaced.
    A row with fewer experts than W names its first once more, with weight 0.
    """
    order = (-scores).argsort(axis=1, kind="stable")
    others, scores = np.take_along_axis(others, order, axis=1), np.take_along_axis(scores, order, axis=1)
    count = np.minimum(wanted, (scores > 0).sum(axis=1))
    serves = np.arange(scores.shape[1]) < count[:, None]
    shares = np.where(serves, scores, 0)
    lost = np.where(replaced, weights, 0).sum(axis=1, keepdims=True)
    shares = shares * (lost / np.maximum(shares.sum(axis=1, keepdims=True), _TINY))
    real = np.concatenate([~replaced, serves], axis=1)
    width = int(real.sum(axis=1).max(initial=0))
    at = (~real).argsort(axis=1, kind="stable")[:, :width]
    real = np.take_along_axis(real, at, axis=1)
    index = np.take_along_axis(np.concatenate([chosen, others], axis=1), at, axis=1)
    gates = np.take_along_axis(np.concatenate([weights, shares], axis=1), at, axis=1)
    return np.where(real, index, index[:, :1]), np.where(real, gates, 0).astype(np.float32)


def widened(chosen: Ids, weights: Floats, width: int) -> tuple[Ids, Floats]:
    """`[T, K]` as `[T, W]`: each row names its first expert again, with weight 0."""
    more = width - chosen.shape[1]
    return np.concatenate([chosen, np.repeat(chosen[:, :1], more, axis=1)], axis=1), np.pad(
        weights, ((0, 0), (0, more))
    )
