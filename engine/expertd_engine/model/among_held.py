"""Rows among held experts by a router's own rule, for those that native code does not know. One row never looks at
another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from expertd_engine.model.substitution import (
    Bools,
    Floats,
    Ids,
    Substituted,
    num_substitutes,
    replaced_choices,
    widened,
    with_substitutes,
)

Select = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""`RouterAdapter.select` under a mask, and how many to choose."""


def among_held(
    select: Select, logits: Tensor, chosen: Ids, weights: Floats, held: Bools, limits: Floats, shared_by: int
) -> Substituted:
    """As `Substitute`, by a router's own `select`.

    What stays is ranked last by it, so that it fills up where the held are few and hides nobody.
    """
    replaced, mass = replaced_choices(weights, ~held[chosen], limits)
    rows = np.flatnonzero(replaced.any(axis=1))
    if not len(rows):
        return Substituted(chosen, weights, replaced.sum(axis=1), mass)
    asked = logits[torch.from_numpy(rows)]
    stays = np.zeros(asked.shape, bool)
    np.put_along_axis(stays, chosen[rows], ~replaced[rows], axis=1)
    lowered = torch.where(torch.from_numpy(stays), asked.amin(dim=1, keepdim=True) - 1, asked)
    allowed = held | stays
    lost = replaced[rows].sum(axis=1)
    wanted = num_substitutes(lost, mass[rows], chosen.shape[1], shared_by)
    more = int((wanted - lost).max())
    top_k = min(chosen.shape[1] + more, int(allowed.sum(axis=1).min()))
    found, scores = select(lowered, torch.from_numpy(allowed), top_k)
    others = found.numpy()
    useful = np.where(np.take_along_axis(stays, others, axis=1), 0, scores.float().numpy())
    some, parts = with_substitutes(chosen[rows], weights[rows], replaced[rows], others, useful, wanted)
    index, shares = widened(chosen, weights, some.shape[1])
    index[rows], shares[rows] = some, parts
    return Substituted(index, shares, replaced.sum(axis=1), mass)
