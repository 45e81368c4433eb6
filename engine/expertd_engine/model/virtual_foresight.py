"""Where a step's tokens will probably go in the next MoE layer: its own norm and router, asked about the present state.

Between two layers the state changes by what attention and experts add, which is little beside what it is: four in five
of the choices are foreseen on a fine-grained model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from expertd_engine.families import Model
from expertd_engine.model.gates import norm_before
from expertd_engine.model.router_kinds import RouterAdapter
from expertd_engine.model.substitution import Floats

Norm = tuple[Floats, Floats]
"""What a norm scales and shifts channels by, `[H]` each."""


class NextLayers:
    """One for a model; `routers` and `norms` are by MoE layer. Matrices are made when a layer is first asked about."""

    def __init__(self, routers: Sequence[RouterAdapter], norms: Sequence[Norm]) -> None:
        self._routers = routers
        self._norms = norms
        self._maps: dict[int, tuple[Floats, Floats]] = {}

    def expected(self, layer: int, hidden: Tensor) -> dict[int, float]:
        """What rows `[T, H]`, as the router of `layer` sees them, will ask of the experts of the layer after it: a
        softmax over each row's top-k logits, summed over rows. There must be such a layer."""
        if layer not in self._maps:
            self._maps[layer] = self._map(layer)
        matrix, bias = self._maps[layer]
        logits = hidden.float().numpy() @ matrix + bias
        top_k = self._routers[layer + 1].top_k
        best = logits.argpartition(-top_k, axis=1)[:, -top_k:] if top_k < logits.shape[1] else logits.argsort(axis=1)
        scores = np.take_along_axis(logits, best, axis=1)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        if len(best) == 1:
            return dict(zip(best[0].tolist(), weights[0].tolist(), strict=True))
        sums = np.bincount(best.ravel(), weights.ravel())
        return {expert: float(sums[expert]) for expert in np.flatnonzero(sums).tolist()}

    @torch.inference_mode()
    def _map(self, layer: int) -> tuple[Floats, Floats]:
        """Matrix `[H, E]` and bias `[E]` from what one layer's router sees to the logits of the next."""
        router, (scale, shift), (to_scale, to_shift) = (
            self._routers[layer + 1],
            self._norms[layer],
            self._norms[layer + 1],
        )
        ratio = np.divide(to_scale, scale, out=np.zeros_like(scale), where=np.abs(scale) > _TINY)
        inputs = torch.cat([torch.diag(torch.from_numpy(ratio)), torch.from_numpy(to_shift - shift * ratio)[None]])
        answers: Floats = router.logits(inputs.to(router.hidden_dtype)).float().numpy()
        own = router.logits(torch.zeros(1, router.hidden_size, dtype=router.hidden_dtype)).float().numpy()[0]
        return np.ascontiguousarray(answers[:-1] - own), answers[-1]


_TINY = 1e-6


def next_layers(model: Model, modules: Sequence[str], routers: Sequence[RouterAdapter]) -> NextLayers:
    """For MoE layers whose experts modules have these names. Raises NotLinear, naming what cannot be foreseen."""
    return NextLayers(routers, [norm_before(model, *pair) for pair in zip(modules, routers, strict=True)])
