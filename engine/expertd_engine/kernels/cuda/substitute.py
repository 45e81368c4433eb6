"""Virtual mode where a row is routed: who answers for the choices that its layer does not hold, and what was asked for.

The rule is that of `kernels/native/substitute.cpp`: of the choices that a row lacks, the lightest are replaced while
their share of its weights stays within its limit; held experts that the router's own rule likes next share what those
weighed. What is neither held nor replaced stays, and is read over the link.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.cuda.selection import HELD, in_best_groups, places
from expertd_engine.model.substitution import ROUNDING, SHARED_FROM

_SHARED_FROM = tl.constexpr(SHARED_FROM)
_ROUNDING = tl.constexpr(float(ROUNDING))
MET = 3
"""Numbers told of each row and layer: choices replaced, the share of the row's weights that they had, choices read over
the link."""


@dataclass(frozen=True, slots=True, eq=False)
class Among:
    """The held experts of one layer, and where what became of `[R]` rows is left. All on the device."""

    held: Tensor
    """int32 `[experts]`: 1 for those that are held, else 0. At least top_k are."""
    counted: Tensor
    """float32 `[R, experts]`, for the time of a launch: what each counts for where a row's experts are ranked."""
    limits: Tensor
    """float32 `[R]`: of the share that is replaced; 1: all."""
    num_rows: Tensor
    """int32 `[1]`: the rows from this one on are padding, and nothing is asked for by them."""
    asked: Tensor
    """float32 `[experts]`: ‖x‖ · weight of each of the routers' own choices is added here; of a lone row it is left
    here, zeros for the others."""
    met: Tensor
    """float32 `[R, MET]`, rows any distance apart."""
    experts: Tensor
    """int32 `[R, W]`, W ≥ top_k: who computes, and some of them again where they are fewer."""
    weights: Tensor
    """float32 `[R, W]`: zeros for those named again."""
    shared_by: int
    """Held experts for each choice replaced, as `model.substitution.num_substitutes` has it; W is `widest` of it."""


@triton.jit
def ask(asked: tl.tensor, wanted: tl.tensor, chosen: tl.tensor, lives: tl.tensor, ALONE: tl.constexpr) -> None:
    """What a row wants of whom it has `chosen`: added to what others want, or, of a lone row, left for all."""
    if ALONE:  # adding would wait for what is far away by then
        tl.store(asked, wanted, lives)
    else:
        tl.atomic_add(asked, wanted, chosen, sem="relaxed")


@triton.jit
def stand_ins(
    held: tl.tensor, chosen: tl.tensor, ahead: tl.tensor, counts: tl.tensor, most: tl.tensor, TOP_K: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Which of the `held` answer, `most` of them, where logits alone decide: all of the choices that are held come
    before all others. `counts`: as in `answer`."""
    return held & (chosen == 0) & (ahead < tl.where(counts >= HELD * TOP_K, TOP_K - counts % HELD + most, 0))


@triton.jit
def most_answering(replaced: tl.tensor, TOP_K: tl.constexpr, SHARED: tl.constexpr) -> tl.tensor:
    """`model.substitution.num_substitutes` where what is replaced weighs enough to be shared."""
    return tl.maximum(replaced, tl.minimum(replaced * SHARED, TOP_K * 3 // 4))


@triton.jit
def answer(
    logits: tl.tensor, score: tl.tensor, expert: tl.tensor, g: tl.tensor, lives: tl.tensor, place: tl.tensor,
    ahead: tl.tensor, held: tl.tensor, serving: tl.tensor, serving_each: tl.tensor, weight: tl.tensor,
    total: tl.tensor, lost: tl.tensor, counts: tl.tensor, favour: tl.tensor, limit: tl.tensor,
    met: tl.tensor, experts: tl.tensor, weights: tl.tensor,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, SCORES: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, BEST: tl.constexpr, PLAIN: tl.constexpr,
) -> None:  # fmt: skip
    """One row, whose router put experts `[G, S]` at `place` with `weight`, zeros but for the chosen, out of `score`, of
    whatever sum; `ahead`: `held` experts that come before each, where the router goes by logits alone (`PLAIN`).
    `total` and `lost` weigh all choices and those that are not held, `counts` holds `HELD` for each expert held and 1
    for each of those. If all of those are replaced, scores of who answers come to `serving` where choices are shared,
    and to `serving_each` where one answers for each; where not `PLAIN` that is yet to be found out. Pointers are to
    this row's numbers.

    Where fewer than TOP_K are held, which is before virtual mode begins, nobody answers for anybody.
    """
    chosen = lives & (place < TOP_K)
    enough = counts >= HELD * TOP_K
    lacking = chosen & (held == 0) & enough
    missed = tl.where(enough, counts % HELD, 0)
    replaced, count = lacking, missed
    total = tl.maximum(total, 1.1754943508222875e-38)
    at = tl.where(enough, ahead, place)
    if limit < 1.0:
        replaced = lacking & (_mass_up_to(weight / total, lacking, place, TOP_K) <= limit + 1e-6)
        lost, count = _total(tl.where(replaced, weight, 0.0)), _total(replaced.to(tl.int32))
    stays, mass = chosen & (replaced == 0), tl.where(count > 0, lost / total, 0.0)
    is_shared = mass + _ROUNDING >= _SHARED_FROM
    most = tl.where(is_shared, most_answering(count, TOP_K, SHARED), count)
    tl.store(met, count.to(tl.float32))
    tl.store(met + 1, mass)
    tl.store(met + 2, (missed - count).to(tl.float32))
    if PLAIN:
        serves = stand_ins(held, chosen, ahead, counts, most, TOP_K)
        serving = tl.where(is_shared, serving, serving_each)
        if limit < 1.0:
            serving, at = _total(tl.where(serves, tl.maximum(score, 1e-30), 0.0)), _by_id(stays | serves)
        more = tl.where(count > 0, tl.minimum(most, counts // HELD - TOP_K + missed), 0)
    else:
        logit = tl.load(logits + expert, lives, float("-inf"))
        others = held & (stays == 0) & _candidates(
            logit, expert, g, lives, stays, held | stays, TOP_K - count + most, favour, SCORES, GROUPS, KEPT, BEST
        )  # fmt: skip
        serves = others & (places(tl.where(others & (logit == logit), logit, float("-inf")), expert) < most)
        serving, more = _total(tl.where(serves, tl.maximum(score, 1e-30), 0.0)), _total(serves.to(tl.int32))
        at = _by_id(stays | serves)
    share = tl.maximum(score, 1e-30) * (lost / tl.maximum(serving, 1e-30))
    _store(expert, at, stays | serves, tl.where(serves, share, tl.where(stays, weight, 0.0)), TOP_K - count + more,
           experts, weights, WIDTH)  # fmt: skip


@triton.jit
def _total(values: tl.tensor) -> tl.tensor:
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def _mass_up_to(share: tl.tensor, lacking: tl.tensor, place: tl.tensor, TOP_K: tl.constexpr) -> tl.tensor:
    """For each `[G, S]` the shares of all that lack and are no heavier, itself included; of equals the one before."""
    mass = tl.zeros_like(share)
    for nth in range(TOP_K):
        theirs = _total(tl.where(lacking & (place == nth), share, 0.0))
        mass += tl.where((theirs < share) | ((theirs == share) & (nth <= place)), theirs, 0.0)
    return mass


@triton.jit
def _candidates(
    logit: tl.tensor, expert: tl.tensor, g: tl.tensor, lives: tl.tensor, stays: tl.tensor, allowed: tl.tensor,
    wanted: tl.tensor, favour: tl.tensor,
    SCORES: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The `wanted` best of those `allowed` by the router's whole rule, groups and biases included. What `stays` is
    ranked last, so that it fills up where the held are few and hides nobody."""
    lowest = tl.min(tl.min(tl.where(lives, logit, float("inf")), 1), 0)
    logit = tl.where(stays, lowest - 1.0, logit)
    if SCORES == 3:
        eligible = tl.where(lives, 1.0 / (1.0 + tl.exp(-tl.where(lives, logit, 0.0))), 0.0)
    else:
        eligible = tl.where(lives, tl.exp(logit - tl.max(tl.max(logit, 1), 0)), 0.0)
        eligible = eligible / _total(eligible)
    if favour is not None:
        eligible = eligible + tl.load(favour + expert, lives, 0.0)
    wanted = tl.minimum(wanted, _total(allowed.to(tl.int32)))
    if GROUPS > 1:  # the lowest stands for those that are not allowed: a group with one that is can still win
        last = tl.min(tl.min(tl.where(lives, eligible, float("inf")), 1), 0)
        grouped = tl.where(lives, tl.where(allowed, eligible, last), float("-inf"))
        grouped = in_best_groups(grouped, expert, g, GROUPS, KEPT, BEST)
        enough = _total((allowed & (grouped > float("-inf"))).to(tl.int32)) >= wanted
        eligible = tl.where(enough, grouped, eligible)
    eligible = tl.where(allowed & (eligible == eligible), eligible, float("-inf"))
    return places(eligible, expert) < wanted


@triton.jit
def _by_id(served: tl.tensor) -> tl.tensor:
    """How many of the served `[G, S]` have a lower id."""
    one = served.to(tl.int32)
    at = tl.cumsum(one, 1) - one
    if served.shape[0] > 1:
        rows = tl.sum(one, 1)
        at += (tl.cumsum(rows, 0) - rows)[:, None]
    return at


@triton.jit
def _store(
    expert: tl.tensor, at: tl.tensor, served: tl.tensor, share: tl.tensor, count: tl.tensor, experts: tl.tensor,
    weights: tl.tensor, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """The `count` served, in places `at` from 0 on; then, from the row's end back, the first of them again, with no
    weight: these are fewer than the served."""
    expert = expert.to(experts.dtype.element_ty)
    tl.store(experts + at, expert, served)
    tl.store(weights + at, share, served)
    again = served & (WIDTH - 1 - at >= count)
    tl.store(experts + (WIDTH - 1 - at), expert, again)
    tl.store(weights + (WIDTH - 1 - at), tl.zeros_like(share), again)
