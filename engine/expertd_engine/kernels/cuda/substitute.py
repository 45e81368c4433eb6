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

from expertd_engine.kernels.cuda.selection import in_best_groups, places

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
    """Held experts for each choice replaced, as far as W has room."""


@triton.jit
def answer(
    logits: tl.tensor, expert: tl.tensor, g: tl.tensor, lives: tl.tensor, place: tl.tensor, weight: tl.tensor,
    length: tl.tensor, is_real: tl.tensor, favour: tl.tensor, held_words: tl.tensor, limit: tl.tensor,
    asked: tl.tensor, met: tl.tensor, experts: tl.tensor, weights: tl.tensor,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, SHARED: tl.constexpr,
    SCORES: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
) -> None:  # fmt: skip
    """One row, whose router put experts `[G, S]` at `place` with `weight`; pointers are to this row's numbers."""
    chosen = lives & (place < TOP_K)
    held = lives & (tl.load(held_words + expert, lives, 0) != 0)
    lacking = chosen & (held == 0)
    weight = tl.where(chosen, weight, 0.0)
    tl.atomic_add(asked + expert, tl.where(is_real, length * weight, 0.0), (place < TOP_K) & lives)
    share = weight / tl.maximum(_total(weight), 1.1754943508222875e-38)
    replaced = lacking
    if limit < 1.0:
        replaced = lacking & (_mass_up_to(share, lacking, place) <= limit + 1e-6)
    count = _total(replaced.to(tl.int32))
    tl.store(met, count.to(tl.float32))
    tl.store(met + 1, _total(tl.where(replaced, share, 0.0)))
    tl.store(met + 2, (_total(lacking.to(tl.int32)) - count).to(tl.float32))
    served = chosen & (replaced == 0)
    shares = tl.where(served, weight, 0.0)
    if count > 0:
        most = tl.minimum(count * SHARED, WIDTH - (TOP_K - count))
        logit = tl.load(logits + expert, lives, float("-inf"), cache_modifier=".cg")
        others = held & (served == 0)
        if (GROUPS > 1) or (favour is not None):
            others = others & _candidates(
                logit, expert, g, lives, served, held | served, TOP_K - count + most, favour,
                SCORES, GROUPS, KEPT, BEST,
            )  # fmt: skip
        logit = tl.where(others & (logit == logit), logit, float("-inf"))
        serves = others & (places(logit, expert) < most)
        if SCORES == 3:
            score = tl.where(serves, 1.0 / (1.0 + tl.exp(-tl.where(serves, logit, 0.0))), 0.0)
        else:
            score = tl.where(serves, tl.exp(tl.where(serves, logit - tl.max(tl.max(logit, 1), 0), 0.0)), 0.0)
        lost = _total(tl.where(replaced, weight, 0.0))
        shares = tl.where(serves, score * (lost / tl.maximum(_total(score), 1.1754943508222875e-38)), shares)
        served = served | serves
    _store(expert, served, shares, experts, weights, WIDTH, BLOCK_W)


@triton.jit
def _total(values: tl.tensor) -> tl.tensor:
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def _mass_up_to(share: tl.tensor, lacking: tl.tensor, place: tl.tensor) -> tl.tensor:
    """For each `[G, S]` the shares of all that lack and are no heavier, itself included; of equals the one before."""
    COUNT: tl.constexpr = share.shape[0] * share.shape[1]
    shares, lacks, at = tl.reshape(share, (COUNT,)), tl.reshape(lacking, (COUNT,)), tl.reshape(place, (COUNT,))
    equal = (shares[None, :] == shares[:, None]) & (at[None, :] <= at[:, None])
    before = lacks[None, :] & ((shares[None, :] < shares[:, None]) | equal)
    return tl.reshape(tl.sum(tl.where(before, shares[None, :], 0.0), 1), share.shape)


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
    expert: tl.tensor, served: tl.tensor, shares: tl.tensor, experts: tl.tensor, weights: tl.tensor,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
) -> None:  # fmt: skip
    """Those served by ascending id, then from the first on again, with no weight."""
    COUNT: tl.constexpr = expert.shape[0] * expert.shape[1]
    ids, serves, parts = tl.reshape(expert, (COUNT,)), tl.reshape(served, (COUNT,)), tl.reshape(shares, (COUNT,))
    count = tl.maximum(tl.sum(serves.to(tl.int32), 0), 1)  # nobody serves where nobody is held: in a trial
    nth = tl.cumsum(serves.to(tl.int32), 0) - 1
    at = tl.arange(0, BLOCK_W)
    here = serves[None, :] & (nth[None, :] == (at % count)[:, None])
    tl.store(experts + at, tl.sum(tl.where(here, ids[None, :], 0), 1).to(experts.dtype.element_ty), at < WIDTH)
    weight = tl.where(at < count, tl.sum(tl.where(here, parts[None, :], 0.0), 1), 0.0)
    tl.store(weights + at, weight, at < WIDTH)
