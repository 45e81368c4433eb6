"""What choosing experts on the device consists of: scores of logits, places by score, the best groups."""

from __future__ import annotations

import triton
import triton.language as tl

_AT_ONCE = tl.constexpr(32)
"""Experts that all are compared with at once. A loop of little code is quicker than a lot of it without a loop: a step
comes here once a layer, and by then the instruction cache has forgotten it."""
_EQUALS_AT_ONCE = tl.constexpr(8)
"""Likewise, where there are equals, which is rare: code that is passed over had better be short."""
HELD = tl.constexpr(1 << 12)
"""What one expert that is held counts for where others are counted beside: below `MOST_EXPERTS` both are exact."""
MOST_EXPERTS = 4094


@triton.jit
def by_logits(
    logits: tl.tensor, counted: tl.tensor, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Where logits alone decide: how many come before each `[BLOCK]` of a row, how many of those held, who is held, the
    highest logit, and `HELD` for each expert held and 1 for each of the first TOP_K that is not. NaN is the lowest; of
    equals a lower id comes first.

    `counted` float32 `[EXPERTS]`: 1, and `HELD` more for those that are held; where it is None nobody is.
    """
    expert = tl.arange(0, BLOCK)
    mine = _ordered(tl.load(logits + expert, expert < EXPERTS, float("-inf")))
    counts, is_held = 0, expert < 0
    if counted is not None:
        is_held = tl.load(counted + expert, expert < EXPERTS, 0.0) > 1.0
    rank = _higher(logits, counted, mine, EXPERTS, BLOCK)
    places_there = tl.where(expert < EXPERTS, rank % HELD, 0)
    if counted is None:
        highest, together = tl.reduce((mine, places_there), 0, _highest_and_sum)
    else:
        lacking = _held_and_lacking(rank, is_held, EXPERTS, TOP_K)
        highest, together, counts = tl.reduce((mine, places_there, lacking), 0, _highest_and_sums)
    if together != EXPERTS * (EXPERTS - 1) // 2:  # some are equal, and have the same place
        rank += _equals_before(logits, counted, mine, EXPERTS, BLOCK)
        if counted is not None:
            counts = tl.sum(_held_and_lacking(rank, is_held, EXPERTS, TOP_K), 0)
    return rank % HELD, rank // HELD, is_held, highest, counts


@triton.jit
def _held_and_lacking(rank: tl.tensor, is_held: tl.tensor, EXPERTS: tl.constexpr, TOP_K: tl.constexpr) -> tl.tensor:
    """What each expert of `rank` adds to `counts`."""
    lives = tl.arange(0, rank.shape[0]) < EXPERTS
    return tl.where(is_held, HELD, (lives & (rank % HELD < TOP_K)).to(tl.int32))


@triton.jit
def _higher(
    logits: tl.tensor, counted: tl.tensor, mine: tl.tensor, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """How many logits are higher than each of `mine`, each counting what `counted` says. Each thread goes over all
    of them by itself: no two wait for each other. Floats, since what adds and what compares are at work together."""
    CHUNK: tl.constexpr = BLOCK if BLOCK < _AT_ONCE else _AT_ONCE
    rank = tl.zeros([BLOCK], tl.float32)
    for first in range(0, BLOCK, CHUNK):
        other = first + tl.arange(0, CHUNK)
        theirs = _told(logits, other, float("-inf"), EXPERTS, BLOCK)
        is_higher = (theirs[:, None] > mine[None, :]).to(tl.float32)  # which NaN never is
        if counted is not None:
            is_higher *= _told(counted, other, 0.0, EXPERTS, BLOCK)[:, None]
        rank += tl.sum(is_higher, 0)
    return rank.to(tl.int32)


@triton.jit
def _equals_before(
    logits: tl.tensor, counted: tl.tensor, mine: tl.tensor, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """As `_higher`: how many of a lower id are equal."""
    CHUNK: tl.constexpr = BLOCK if BLOCK < _EQUALS_AT_ONCE else _EQUALS_AT_ONCE
    expert = tl.arange(0, BLOCK)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, CHUNK):
        other = first + tl.arange(0, CHUNK)
        theirs = _ordered(_told(logits, other, float("-inf"), EXPERTS, BLOCK))
        before = (theirs[:, None] == mine[None, :]) & (other[:, None] < expert[None, :])
        count = tl.full([CHUNK], 1, tl.int32)
        if counted is not None:
            count = _told(counted, other, 0.0, EXPERTS, BLOCK).to(tl.int32)
        rank += tl.sum(tl.where(before, count[:, None], 0), 0)
    return rank


@triton.jit
def _told(
    values: tl.tensor, expert: tl.tensor, other: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Of these experts; `other` past the last."""
    if EXPERTS == BLOCK:
        return tl.load(values + expert)
    else:
        return tl.load(values + expert, expert < EXPERTS, other)


@triton.jit
def _ordered(found: tl.tensor) -> tl.tensor:
    return tl.where(found == found, found, float("-inf"))


@triton.jit
def _highest_and_sum(
    a: tl.tensor, b: tl.tensor, more_a: tl.tensor, more_b: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    return tl.maximum(a, more_a), b + more_b


@triton.jit
def _highest_and_sums(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, more_a: tl.tensor, more_b: tl.tensor, more_c: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    return tl.maximum(a, more_a), b + more_b, c + more_c


@triton.jit
def by_scores(
    scores: tl.tensor, expert: tl.tensor, g: tl.tensor, lives: tl.tensor, favour: tl.tensor,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Where groups or biases count: how many come before each `[G, S]` of a row by the router's rule. NaN is chosen
    last."""
    eligible = scores
    if favour is not None:
        eligible = scores + tl.load(favour + expert, lives, 0.0)
    eligible = tl.where(lives & (eligible == eligible), eligible, float("-inf"))
    if GROUPS > 1:
        eligible = in_best_groups(eligible, expert, g, GROUPS, KEPT, BEST)
    return places(eligible, expert)


@triton.jit
def places(eligible: tl.tensor, expert: tl.tensor) -> tl.tensor:
    """How many come before each `[G, S]`: those that are higher, and equals of a lower id. All are compared at once."""
    COUNT: tl.constexpr = eligible.shape[0] * eligible.shape[1]
    values, ids = tl.reshape(eligible, (COUNT,)), tl.reshape(expert, (COUNT,))
    ahead = (values[:, None] > values[None, :]) | ((values[:, None] == values[None, :]) & (ids[:, None] < ids[None, :]))
    return tl.reshape(tl.sum(ahead.to(tl.int32), 0), eligible.shape)


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


@triton.jit
def sums_of_two(a: tl.tensor, b: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Each summed over `[G, S]`, both at once."""
    COUNT: tl.constexpr = a.shape[0] * a.shape[1]
    a, b = tl.reduce((tl.reshape(a, (COUNT,)), tl.reshape(b, (COUNT,))), 0, _two_added)
    return a, b


@triton.jit
def sums_of_five(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, e: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """As `sums_of_two`."""
    COUNT: tl.constexpr = a.shape[0] * a.shape[1]
    a, b, c = tl.reshape(a, (COUNT,)), tl.reshape(b, (COUNT,)), tl.reshape(c, (COUNT,))
    d, e = tl.reshape(d, (COUNT,)), tl.reshape(e, (COUNT,))
    a, b, c, d, e = tl.reduce((a, b, c, d, e), 0, _five_added)
    return a, b, c, d, e


@triton.jit
def _two_added(
    a: tl.tensor, b: tl.tensor, more_a: tl.tensor, more_b: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    return a + more_a, b + more_b


@triton.jit
def _five_added(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, e: tl.tensor,
    more_a: tl.tensor, more_b: tl.tensor, more_c: tl.tensor, more_d: tl.tensor, more_e: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    return a + more_a, b + more_b, c + more_c, d + more_d, e + more_e
