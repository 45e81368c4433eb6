"""Routes the tokens of virtual steps among held experts, and observes where they would have gone. Owns the masks.

What a token loses is its *substituted mass*: the share of the gate weight of its own choices that lies on experts that
are not held. A row may lose up to its limit in every layer: of the choices that it lacks, the lightest are substituted
as long as their mass stays within it, the others are waited for. Arithmetic is in numpy: at a few rows a torch call
costs more than what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertd_engine.experts.held import HeldExperts
from expertd_engine.request import Substitutions

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]
Bools: TypeAlias = NDArray[np.bool_]


class LayerRouter(Protocol):
    """A `RouterAdapter`, as far as it is needed here."""

    def logits(self, hidden: Tensor) -> Tensor: ...

    def select(self, logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


Score = Callable[[int, NDArray[np.float32], Ids, Floats], Floats]
"""What each choice counts for: of layer, rows' norms `[T]`, experts and weights `[T, K]`, to `[T, K]`."""


def importance(norms: Sequence[Floats]) -> Score:
    """SwapMoE's score, ‖x‖·g·‖E‖, from the norms `[E]` of each layer's experts."""

    def score(layer: int, lengths: Floats, chosen: Ids, weights: Floats) -> Floats:
        product: Floats = lengths[:, None] * weights * norms[layer][chosen]
        return product

    return score


@dataclass(slots=True)
class VirtualCounts:
    """Since start, by MoE layer."""

    activations: list[int]
    """(token, choice) pairs of virtual steps."""
    substituted: list[int]
    """Of these: answered by another expert than the router's own."""
    mass: list[float]
    """Substituted mass, summed over tokens."""
    tokens: int = 0
    fetched: int = 0
    """Choices whose expert was not held and was waited for, all layers together."""

    @classmethod
    def of(cls, layers: int) -> VirtualCounts:
        return cls([0] * layers, [0] * layers, [0.0] * layers)


class VirtualRouting:
    """Routes virtual steps. Used by `MoELayer` in the place of what the model's router chose."""

    def __init__(self, routers: Sequence[LayerRouter], held: HeldExperts, score: Score) -> None:
        self.held = held
        self.counts = VirtualCounts.of(len(routers))
        self.logits: Tensor | None = None
        """Router logits `[T, E]` of the layer about to be routed, where the step's path has them."""
        self.routers = routers
        self.score = score
        self._masks: list[Bools] = [np.zeros(count, bool) for count in held.room.experts]
        self._made_at = -1
        self._limits: Floats = np.zeros(0, np.float32)
        self._substituted = np.zeros(0, np.int64)
        self._mass: Floats = np.zeros(0, np.float32)
        self._never_wait = True
        """No row has a limit."""
        self._choices = 0
        """Of each row, in the layers so far."""

    def begin_step(self, limits: Sequence[float]) -> bool:
        """A step of rows with these limits of substituted mass begins; as `HeldExperts.begin_step`."""
        is_open = self.held.begin_step()
        sets = self.held.sets
        if self._made_at != sets.changes:
            for layer, mask in enumerate(self._masks):
                mask[:] = False
                mask[list(sets.held(layer))] = True
            self._made_at = sets.changes
        self._limits = np.array(limits, np.float32)
        self._never_wait = min(limits, default=1.0) >= 1
        self._substituted = np.zeros(len(limits), np.int64)
        self._mass = np.zeros(len(limits), np.float32)
        self._choices = 0
        return is_open

    def end_step(self, sequences: int) -> None:
        """The step of so many sequences has ended, well or not."""
        self.logits = None
        self.counts.tokens += len(self._limits)
        self.held.end_step(len(self._limits) / max(1, sequences))

    def row_counts(self, start: int, stop: int) -> Substitutions:
        """What the rows from `start` to `stop` met in the step, over all layers."""
        return Substitutions(
            choices=(stop - start) * self._choices,
            substituted=int(self._substituted[start:stop].sum()),
            mass=float(self._mass[start:stop].sum()) / len(self.routers),
            tokens=stop - start,
        )

    def route(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights `[T, K]` for `hidden` `[T, H]`, where the router chose `top_k_index`, `top_k_weights`."""
        chosen, weights = top_k_index.numpy(), top_k_weights.float().numpy()
        self.observe(layer, hidden, chosen, weights)
        lacking = ~self._masks[layer][chosen]
        if not lacking.any():
            return top_k_index, top_k_weights
        replaced, mass = _substituted(weights, lacking, self._limits)
        self.count(layer, replaced, mass)
        self.counts.fetched += int(lacking.sum() - replaced.sum())
        rows = np.flatnonzero(replaced.any(axis=1))
        if len(rows) == len(chosen) and self._never_wait:
            index, shares = self._select(layer, hidden, slice(None), self._masks[layer])
            return index, shares.to(top_k_weights.dtype)
        if not len(rows):
            return top_k_index, top_k_weights
        mask = np.repeat(self._masks[layer][None], len(rows), axis=0)
        np.put_along_axis(mask, chosen[rows], ~replaced[rows], axis=1)
        at = torch.from_numpy(rows)
        index, shares = self._select(layer, hidden, at, mask)
        new_index, new_weights = top_k_index.clone(), top_k_weights.clone()
        new_index[at], new_weights[at] = index, shares.to(new_weights.dtype)
        return new_index, new_weights

    def _select(self, layer: int, hidden: Tensor, at: Tensor | slice, mask: Bools) -> tuple[Tensor, Tensor]:
        """Experts and weights of rows `at`, among those that `mask` allows."""
        router = self.routers[layer]
        logits = router.logits(hidden[at]) if self.logits is None else self.logits[at]
        return router.select(logits, torch.from_numpy(mask))

    def mask(self, layer: int) -> Bools:
        """`[E]`: who is held in the step."""
        return self._masks[layer]

    def observe(self, layer: int, hidden: Tensor, chosen: Ids, weights: Floats) -> None:
        """Where the router would have sent the step's rows."""
        self.counts.activations[layer] += chosen.size
        self._choices += chosen.shape[1]
        lengths = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32).numpy()
        values = self.score(layer, lengths, chosen, weights).ravel()
        flat = chosen.ravel()
        if len(chosen) == 1:
            sums = dict(zip(flat.tolist(), values.tolist(), strict=True))
        else:
            total = np.bincount(flat, values)
            sums = {expert: float(total[expert]) for expert in np.flatnonzero(total).tolist()}
        self.held.sets.observe(layer, sums)

    def count(self, layer: int, replaced: Bools, mass: Floats) -> None:
        """Which of the step's choices `[T, K]` others answer for, and the mass `[T]` of those."""
        self._substituted += replaced.sum(axis=1)
        self._mass += mass
        self.counts.substituted[layer] += int(replaced.sum())
        self.counts.mass[layer] += float(mass.sum())


def _substituted(weights: Floats, lacking: Bools, limits: Floats) -> tuple[Bools, Floats]:
    """Which choices `[T, K]` are replaced and each row's substituted mass `[T]`: the lightest of those lacking whose
    mass together stays within the row's limit."""
    lost: Floats = np.where(lacking, weights, 0) / np.maximum(weights.sum(axis=1, keepdims=True), _TINY)
    if limits.min(initial=1) >= 1:
        return lacking, lost.sum(axis=1)
    order = lost.argsort(axis=1, kind="stable")
    ascending = np.take_along_axis(lost, order, axis=1).cumsum(axis=1)
    within = np.empty_like(lacking)
    np.put_along_axis(within, order, (ascending <= limits[:, None] + _ROUNDING) | (limits >= 1)[:, None], axis=1)
    replaced = lacking & within
    mass: Floats = np.where(replaced, lost, 0).sum(axis=1)
    return replaced, mass


_TINY = np.finfo(np.float32).tiny
_ROUNDING = np.float32(1e-6)
