"""What choosing experts on the device consists of: scores of logits, places by score, the best groups."""

from __future__ import annotations

import triton
import triton.language as tl


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
