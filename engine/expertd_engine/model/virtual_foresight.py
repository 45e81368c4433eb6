"""Where a step's tokens will probably go in the next MoE layer: its own norm and router, asked about the present state.

Between two layers the state changes by what attention and experts add, which is little beside what it is: four in five
of the choices are foreseen on a fine-grained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from expertd_engine.families import Model
from expertd_engine.model.gates import norm_before
from expertd_engine.model.router_kinds import ModuleRouterAdapter


class NextLayers:
    """One for a model. `routers` and `norms` are by MoE layer; of a norm, its scales and shifts `[H]`."""

    def __init__(self, routers: Sequence[ModuleRouterAdapter], norms: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._routers = routers
        self._steps = [_between(*pair) for pair in pairwise(norms)]

    def expected(self, layer: int, hidden: Tensor) -> dict[int, float]:
        """What rows `[T, H]`, as the router of `layer` sees them, will ask of the experts of the layer after it: gate
        weight, summed over rows. There must be such a layer."""
        scale, shift = self._steps[layer]
        router = self._routers[layer + 1]
        index, weights = router.select(router.logits((hidden * scale + shift).to(router.hidden_dtype)))
        sums = np.bincount(index.flatten().numpy(), weights.flatten().float().numpy())
        return {expert: float(sums[expert]) for expert in np.flatnonzero(sums).tolist()}


def _between(norm: tuple[Tensor, Tensor], following: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and shift that turn what one norm gives into what the next would give of the same state."""
    (scale, shift), (to_scale, to_shift) = norm, following
    ratio = torch.where(scale.abs() > _TINY, to_scale / scale, 0.0)
    return ratio, to_shift - shift * ratio


_TINY = 1e-6


def next_layers(model: Model, modules: Sequence[str], routers: Sequence[ModuleRouterAdapter]) -> NextLayers:
    """For MoE layers whose experts modules have these names. Raises NotLinear, naming what cannot be foreseen."""
    norms = []
    for name, router in zip(modules, routers, strict=True):
        scale, shift = norm_before(model, name, router)
        norms.append((torch.from_numpy(scale), torch.from_numpy(shift)))
    return NextLayers(routers, norms)
