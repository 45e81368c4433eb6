"""What choosing experts on the device consists of: scores of logits, places by score, the best groups."""

from __future__ import annotations

import triton
import triton.language as tl

_AT_ONCE = tl.constexpr(32)
"""Experts that all are compared with at once. A loop of little code is quicker than a lot of it without a loop: a step
comes here once a layer, and by then the instruction cache has forgotten it."""
HELD = tl.constexpr(1 << 16)


@triton.jit
def ranked(
    logits: tl.tensor, scores: tl.tensor, expert: tl.tensor, g: tl.tensor, lives: tl.tensor, favour: tl.tensor,
    held: tl.tensor, EXPERTS: tl.constexpr, SCORES: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    BEST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """How many come before each `[G, S]` of a row by the router's rule; and how many of the held do, where logits alone
    decide and `held` is given."""
    if (GROUPS == 1) and (favour is None):  # a higher logit is a higher score
        rank = tl.reshape(_ranks(logits, held, EXPERTS, scores.shape[1]), scores.shape)
        place, ahead = rank % HELD, rank // HELD
        if SCORES == 2:  # one NaN, and all scores are: then ids alone tell them apart
            place = tl.where(scores == scores, place, expert)
    else:
        eligible = scores
        if favour is not None:
            eligible = scores + tl.load(favour + expert, lives, 0.0)
        eligible = tl.where(lives & (eligible == eligible), eligible, float("-inf"))  # NaN is chosen last
        if GROUPS > 1:
            eligible = in_best_groups(eligible, expert, g, GROUPS, KEPT, BEST)
        place = places(eligible, expert)
        ahead = place
    return place, ahead


@triton.jit
def _ranks(logits: tl.tensor, held: tl.tensor, EXPERTS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """How many logits of a row come before each `[BLOCK]`: those that are higher, and equals of a lower id; NaN is the
    lowest. Each that is held, if `held` is given, counts `HELD` more."""
    CHUNK: tl.constexpr = BLOCK if BLOCK < _AT_ONCE else _AT_ONCE
    expert, other = tl.arange(0, BLOCK), tl.arange(0, CHUNK)
    mine, following = _ordered(logits, expert, EXPERTS), _ordered(logits, other, EXPERTS)
    counts = _counted(held, other, EXPERTS)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, CHUNK):
        theirs, count, at = following, counts, first + other
        following, counts = _ordered(logits, at + CHUNK, EXPERTS), _counted(held, at + CHUNK, EXPERTS)
        ahead = (theirs[None, :] > mine[:, None]) | (
            (theirs[None, :] == mine[:, None]) & (at[None, :] < expert[:, None])
        )
        rank += tl.sum(tl.where(ahead, count[None, :], 0), 1)
    return rank


@triton.jit
def _ordered(logits: tl.tensor, expert: tl.tensor, EXPERTS: tl.constexpr) -> tl.tensor:
    found = tl.load(logits + expert, expert < EXPERTS, float("-inf"), cache_modifier=".cg")
    return tl.where(found == found, found, float("-inf"))


@triton.jit
def _counted(held: tl.tensor, expert: tl.tensor, EXPERTS: tl.constexpr) -> tl.tensor:
    if held is None:
        return (expert >= 0).to(tl.int32)
    else:
        return tl.where(tl.load(held + expert, expert < EXPERTS, 0) != 0, HELD + 1, 1)


@triton.jit
def places(eligible: tl.tensor, expert: tl.tensor) -> tl.tensor:
    """How many come before each `[G, S]`: those that are higher, and equals of a lower id. All are compared at once."""
    COUNT: tl.constexpr = eligible.shape[0] * eligible.shape[1]
    values, ids = tl.reshape(eligible, (COUNT,)), tl.reshape(expert, (COUNT,))
    ahead = (values[None, :] > values[:, None]) | ((values[None, :] == values[:, None]) & (ids[None, :] < ids[:, None]))
    return tl.reshape(tl.sum(ahead.to(tl.int32), 1), eligible.shape)


@triton.jit
def scored(logits: tl.tensor, lives: tl.tensor, SCORES: tl.constexpr) -> tl.tensor:
    """Scores of a row's logits `[G, S]`."""
    if SCORES == 3:
        return tl.where(lives, 1.0 / (1.0 + tl.exp(-tl.where(lives, logits, 0.0))), 0.0)
    elif SCORES == 4:
        return logits
    else:
        best = tl.max(tl.max(logits, 1), 0)
        scores = tl.where(lives, tl.exp(logits - best), 0.0)
        return scores / tl.sum(tl.sum(scores, 1), 0)


@triton.jit
def in_best_groups(
    eligible: tl.tensor, expert: tl.tensor, g: tl.tensor, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """`eligible` but for the experts outside the best groups: a group is worth its BEST highest together."""
    left = eligible
    worth = tl.zeros([left.shape[0], 1], tl.float32)
    for _ in tl.static_range(BEST):
        best = tl.max(left, 1)[:, None]
        first = tl.min(tl.where(left == best, expert, 2147483647), 1)[:, None]
        worth += best
        left = tl.where(expert == first, float("-inf"), left)
    worth = tl.where(g < GROUPS, worth, float("-inf"))
    kept = g < 0
    for _ in tl.static_range(KEPT):
        best = tl.max(tl.where(kept, float("-inf"), worth), 0)[None, :]
        first = tl.min(tl.where((worth == best) & (kept == 0), g, 2147483647), 0)[None, :]
        kept = kept | (g == first)
    return tl.where(kept, eligible, float("-inf"))
