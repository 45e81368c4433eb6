"""Routes the tokens of virtual steps among held experts, and observes where they would have gone. Owns the masks.

What a token loses is its *substituted mass*: the share of the gate weight of its own choices that lies on experts that
are not held. A row may lose up to its limit in every layer: of the choices that it lacks, the lightest are substituted
as long as their mass stays within it, the others are waited for. Choices that stay keep their weight; held experts that
the router's own rule likes next share what the others weighed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from expertd_engine.experts.held import HeldExperts
from expertd_engine.model.among_held import among_held
from expertd_engine.model.moe import FEW_ROWS
from expertd_engine.model.step_routes import Substitute
from expertd_engine.model.substitution import SHARED_BY, Bools, Floats, Ids, Int32s, Met
from expertd_engine.model.virtual_counts import RowSums, Tally
from expertd_engine.sequence_stats import Substitutions


class LayerRouter(Protocol):
    """A `RouterAdapter`, as far as it is needed here."""

    def logits(self, hidden: Tensor) -> Tensor: ...

    def select(self, logits: Tensor, mask: Tensor | None = None, top_k: int | None = None) -> tuple[Tensor, Tensor]: ...


class Foresight(Protocol):
    """What rows will ask of the experts of the layer after this one; `virtual_foresight.NextLayers` says more."""

    def expected(self, layer: int, hidden: Tensor) -> dict[int, float]: ...


class TokenForesight(Protocol):
    """Where tokens will be sent; `token_routes.TokenRoutes` says more."""

    def expected(self, token_ids: Sequence[int]) -> Floats: ...


Layers = int | Ids
"""One, or `[n, 1, 1]`."""

Score = Callable[[Layers, Floats, Ids, Floats], Floats]
"""What each choice counts for: of layer, rows' norms `[T]`, experts and weights `[T, K]`, to `[T, K]`; of several
layers, `[n, T]` and `[n, T, K]`."""


class Importance:
    """SwapMoE's `Score`, ‖x‖·g·‖E‖, from the norms `[E]` of each layer's experts. Native runs sum it up as they go."""

    def __init__(self, norms: Sequence[Floats]) -> None:
        self._width = max(map(len, norms))
        self._table = np.zeros(len(norms) * self._width, np.float32)
        self.norms = [
            self._table[layer * self._width : layer * self._width + len(row)] for layer, row in enumerate(norms)
        ]
        for mine, row in zip(self.norms, norms, strict=True):
            mine[:] = row

    def __call__(self, layer: Layers, lengths: Floats, chosen: Ids, weights: Floats) -> Floats:
        product: Floats = lengths[..., None] * weights * self._table.take(layer * self._width + chosen)
        return product


class VirtualRouting:
    """Routes virtual steps. Used by `MoELayer` in the place of what the model's router chose."""

    routes_natively = True
    """Whether `route` does what native code does; not where it is overridden."""

    def __init__(
        self,
        routers: Sequence[LayerRouter],
        held: HeldExperts,
        score: Score,
        foresight: Foresight | None = None,
        shared_by: int = SHARED_BY,
        tokens: TokenForesight | None = None,
    ) -> None:
        """Without `foresight` or `tokens`, or limits that let them bring anyone in, sets follow what has been asked for
        alone. `shared_by`: as `with_substitutes`."""
        self.held = held
        sets = held.sets
        # With swaps after steps it is asked each time who is best and worst: that is kept up as scores are observed.
        norms = score.norms if isinstance(score, Importance) and not sets.limits.per_step else None
        self.tally = Tally(len(routers), norms, sets.scores, sets.width)
        self.counts = self.tally.counts()
        self.logits: Tensor | None = None
        """Router logits `[T, E]` of the layer about to be routed, where the step's path has them."""
        self._native: Substitute | None = None
        """Who replaces choices in that layer, where native code has its rule."""
        self.routers = routers
        self.score = score
        self.foresight = foresight
        self.tokens = tokens
        self.shared_by = shared_by
        self.settles = False
        """Layers wait for the loads under way: for measurements whose result may depend on nothing but the text."""
        self.masks: Sequence[Bools] = held.table.masks
        self.places: Sequence[Ids] = held.table.slots
        self.limits: Floats = np.zeros(0, np.float32)
        self.row_sums = RowSums(0)
        self._choices = 0
        """Of each row, in the layers so far."""

    def begin_step(self, limits: Sequence[float], token_ids: Sequence[int]) -> bool:
        """A step of these tokens, with such limits of substituted mass, begins; as `HeldExperts.begin_step`."""
        is_open = self.held.begin_step()
        self.limits = np.array(limits, np.float32)
        self.row_sums = RowSums(len(limits))
        self._choices = 0
        if is_open and self.tokens is not None and self.held.sets.limits.foreseen:
            if self.settles:
                self.held.settle()
            self.held.bring(self.tokens.expected(token_ids))
        return is_open

    def end_step(self, sequences: int) -> None:
        """The step of so many sequences has ended, well or not."""
        self.logits = self._native = None
        self.counts.tokens += len(self.limits)
        self.held.end_step(len(self.limits) / max(1, sequences))

    def row_counts(self, start: int, stop: int) -> Substitutions:
        """What the rows from `start` to `stop` met in the step, over all layers."""
        return Substitutions(
            choices=(stop - start) * self._choices,
            substituted=sum(self.row_sums.substituted[start:stop]),
            mass=sum(self.row_sums.mass[start:stop]) / len(self.routers),
            tokens=stop - start,
        )

    def route(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights `[T, W]` for `hidden` `[T, H]`, where the router chose `top_k_index`, `top_k_weights`
        `[T, K]`; W ≥ K."""
        chosen, weights = top_k_index.numpy(), top_k_weights.float().numpy()
        mask = self.mask(layer)
        self.observe(layer, hidden, chosen, weights)
        self._foresee(layer, hidden)
        lacking = ~mask[chosen]
        if not lacking.any():
            return top_k_index, top_k_weights
        few = len(self.limits) <= FEW_ROWS  # memory was measured for K choices a row of larger steps
        logits = self.routers[layer].logits(hidden) if self.logits is None else self.logits
        substitute = self._native or partial(among_held, self.routers[layer].select)
        done = substitute(logits, chosen, weights, mask, self.limits, self.shared_by if few else 1)
        self.count(layer, done.replaced, done.mass)
        self.counts.fetched += int(lacking.sum() - done.replaced.sum())
        return torch.from_numpy(done.index), torch.from_numpy(done.weights).to(top_k_weights.dtype)

    @property
    def _foresees(self) -> bool:
        return self.foresight is not None and self.held.sets.limits.ahead > 0

    # ------------------------------------------------------------ native runs

    @property
    def unit(self) -> float:
        """As `VirtualExperts.unit`."""
        return self.held.sets.unit

    @property
    def runs(self) -> bool:
        """Whether native code may route layer after layer: nobody is brought in on the way to a layer."""
        return self.routes_natively and not self._foresees

    def refresh(self) -> None:
        """Native code is about to run: it sees by itself who arrives, and the sets hear of that as a step begins."""
        if self.settles:
            self.held.settle()

    def seen(self, logits: Tensor, substitute: Substitute | None) -> None:
        """As `Reroute.seen`."""
        self.logits, self._native = logits, substitute

    def ran(self, met: Met) -> None:
        """Layers have run on: what `route` would have noted of them."""
        if not met.layers:
            return
        self._choices += len(met.layers) * met.top_k
        self.held.cache.served(
            [(layer, experts, pairs) for layer, (experts, pairs) in zip(met.layers, met.served, strict=True)]
        )
        if self.tally.norms is not None:
            self.held.sets.observed(met.layers)
            return
        asked = met.asked()
        values = self.score(np.array(met.layers)[:, None, None], asked.lengths, asked.chosen, asked.weights)
        self.held.sets.observe_each(met.layers, _sums_of_layers(asked.chosen, values))

    def _foresee(self, layer: int, hidden: Tensor) -> None:
        """Let the next layer's set begin to follow what the step will ask of it."""
        following = layer + 1
        sets = self.held.sets
        if not self._foresees or following == len(self.routers) or sets.holds_all(following):
            return
        assert self.foresight is not None
        self.held.foresee(following, self.foresight.expected(layer, hidden))

    def slots(self, layer: int, experts: Sequence[int], pairs: Sequence[int]) -> list[int] | None:
        """As `HeldExperts.slots`."""
        return self.held.slots(layer, experts, pairs)

    def mask(self, layer: int) -> Bools:
        """`[E]`: who is held now, which nobody changes meanwhile. Takes in what has arrived on the way here."""
        self._take_in()
        return self.held.table.shown[layer]

    def _take_in(self) -> None:
        if self.held.sets.is_settled:
            return
        if self.settles:
            self.held.settle()
        else:
            self.held.pump()

    def observe(self, layer: int, hidden: Tensor, chosen: Ids, weights: Floats) -> None:
        """Where the router would have sent the step's rows."""
        self.counts.activations[layer] += chosen.size
        self._choices += chosen.shape[1]
        rows = hidden.float().numpy()
        lengths: Floats = np.sqrt(np.einsum("th,th->t", rows, rows))
        self.held.sets.observe_each([layer], [_sums(chosen, self.score(layer, lengths, chosen, weights))])

    def count(self, layer: int, replaced: Ids | Int32s, mass: Floats) -> None:
        """How many of each row's choices others answer for `[T]`, and the mass `[T]` of those."""
        self.row_sums.add(replaced, mass)
        self.counts.substituted[layer] += int(replaced.sum())
        self.counts.mass[layer] += float(mass.sum())


def _sums(chosen: Ids, values: Floats) -> tuple[list[int], list[float]]:
    """Experts, and the sum of each, from `[T, K]` each."""
    if len(chosen) == 1:
        return chosen[0].tolist(), values[0].tolist()
    total = np.bincount(chosen.ravel(), values.ravel())
    experts = np.flatnonzero(total)
    return experts.tolist(), total[experts].tolist()


def _sums_of_layers(chosen: Ids, values: Floats) -> Iterable[tuple[list[int], list[float]]]:
    """As `_sums`, from `[n, T, K]` each: what one token chose in all layers becomes lists at once."""
    if chosen.shape[1] == 1:
        return zip(chosen[:, 0].tolist(), values[:, 0].tolist(), strict=True)
    return map(_sums, chosen, values)
