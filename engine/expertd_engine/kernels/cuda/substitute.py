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

MET = 3
"""Numbers told of each row and layer: choices replaced, the share of the row's weights that they had, choices read over
the link."""


@dataclass(frozen=True, slots=True, eq=False)
class Among:
    """The held experts of one layer, and where what became of `[R]` rows is left. All on the device."""

    held: Tensor
    """int32 `[experts]`: 0 for those that are not held. At least top_k are."""
    limits: Tensor
    """float32 `[R]`: of the share that is replaced; 1: all."""
    num_rows: Tensor
    """int32 `[1]`: the rows from this one on are padding, and nothing is asked for by them."""
    asked: Tensor
    """float32 `[experts]`: ‖x‖ · weight of each of the routers' own choices is added here."""
    met: Tensor
    """float32 `[R, MET]`, rows any distance apart."""
    experts: Tensor
    """int32 `[R, W]`, W ≥ top_k: who computes, and the first of them again where they are fewer."""
    weights: Tensor
    """float32 `[R, W]`: zeros for those named again."""
    shared_by: int
    """Held experts for each choice replaced, as `model.substitution.num_substitutes` has it; W is `widest` of it."""


@triton.jit
def answer(
    logits: tl.tensor, score: tl.tensor, expert: tl.tensor, g: tl.tensor, lives: tl.tensor, place: tl.tensor,
    ahead: tl.tensor, weight: tl.tensor, length: tl.tensor, is_real: tl.tensor, favour: tl.tensor,
    held_words: tl.tensor, limit: tl.tensor, asked: tl.tensor, met: tl.tensor, experts: tl.tensor, weights: tl.tensor,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, SCORES: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, BEST: tl.constexpr,
) -> None:  # fmt: skip
    """One row, whose router put experts `[G, S]` at `place` with `weight`, out of `score`; `ahead`: held experts that
    come before each, where the router goes by logits alone. Pointers are to this row's numbers.

    Where fewer than TOP_K are held, which is before virtual mode begins, nobody answers for anybody.
    """
    chosen = lives & (place < TOP_K)
    held = lives & (tl.load(held_words + expert, lives, 0) != 0)
    lacking = chosen & (held == 0)
    weight = tl.where(chosen, weight, 0.0)
    tl.atomic_add(asked + expert, tl.where(is_real, length * weight, 0.0), chosen, sem="relaxed")
    counts = held.to(tl.int32) * HELD + lacking.to(tl.int32)
    total, lost, counts = _sums(weight, tl.where(lacking, weight, 0.0), counts)
    lacking = lacking & (counts >= HELD * TOP_K)
    missed = tl.where(counts >= HELD * TOP_K, counts % HELD, 0)
    replaced, count = lacking, missed
    total = tl.maximum(total, 1.1754943508222875e-38)
    if limit < 1.0:
        replaced = lacking & (_mass_up_to(weight / total, lacking, place, TOP_K) <= limit + 1e-6)
        _, lost, count = _sums(weight, tl.where(replaced, weight, 0.0), replaced.to(tl.int32))
    tl.store(met, count.to(tl.float32))
    tl.store(met + 1, tl.where(count > 0, lost / total, 0.0))
    tl.store(met + 2, (missed - count).to(tl.float32))
    stays = chosen & (replaced == 0)
    most = tl.maximum(count, tl.minimum(count * SHARED, TOP_K * 3 // 4))
    if (GROUPS > 1) or (favour is not None):
        logit = tl.load(logits + expert, lives, float("-inf"), cache_modifier=".cg")
        others = held & (stays == 0) & _candidates(
            logit, expert, g, lives, stays, held | stays, TOP_K - count + most, favour, SCORES, GROUPS, KEPT, BEST
        )  # fmt: skip
        serves = others & (places(tl.where(others & (logit == logit), logit, float("-inf")), expert) < most)
    else:  # all of the choices that are held come before all others
        serves = held & (chosen == 0) & (ahead < tl.where(count > 0, TOP_K - missed + most, 0))
    score = tl.where(serves, tl.maximum(score, 1e-30), 0.0)
    all_scores, _, more = _sums(score, score, serves.to(tl.int32))
    shares = tl.where(serves, score * (lost / tl.maximum(all_scores, 1e-30)), tl.where(stays, weight, 0.0))
    _store(expert, stays | serves, shares, TOP_K - count + more, experts, weights, TOP_K, WIDTH)


@triton.jit
def _sums(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Each summed over `[G, S]`, all at once: a sum waits for all threads."""
    COUNT: tl.constexpr = a.shape[0] * a.shape[1]
    a, b, c = tl.reduce((tl.reshape(a, (COUNT,)), tl.reshape(b, (COUNT,)), tl.reshape(c, (COUNT,))), 0, _added)
    return a, b, c


@triton.jit
def _added(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, more_a: tl.tensor, more_b: tl.tensor, more_c: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    return a + more_a, b + more_b, c + more_c


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
def _store(
    expert: tl.tensor, served: tl.tensor, shares: tl.tensor, count: tl.tensor, experts: tl.tensor, weights: tl.tensor,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """The `count` served, at least TOP_K, by ascending id; then the first of them again, with no weight."""
    one = served.to(tl.int32)
    at = tl.cumsum(one, 1) - 1
    if expert.shape[0] > 1:
        rows = tl.sum(one, 1)
        at += (tl.cumsum(rows, 0) - rows)[:, None]
    expert = expert.to(experts.dtype.element_ty)
    tl.store(experts + at, expert, served)
    tl.store(weights + at, shares, served)
    for spare in tl.static_range(TOP_K, WIDTH):
        again = served & (at == 0) & (at + count <= spare)
        tl.store(experts + spare + at, expert, again)
        tl.store(weights + spare + at, tl.zeros_like(shares), again)
