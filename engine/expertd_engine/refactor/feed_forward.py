"""The feed-forward block of a refactored model while it is trained: a permanent part, and experts by a route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear, softmax

from expertd_engine.refactor.parts import FullPart, LowRankPart
from expertd_engine.refactor.shape import Routing, Shape


@dataclass(slots=True)
class Route:
    """Where tokens go: `(token, choice)` pairs sorted by expert, ends of the experts' runs, and the way back."""

    order: Tensor
    ends: Tensor
    back: Tensor
    weights: Tensor | None


def dispatch(index: Tensor, experts: int, weights: Tensor | None = None) -> Route:
    """The route of `index` `[T, K]`; `weights` `[T, K]`, None for weight 1."""
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(experts, device=flat.device), right=True, out_int32=True)
    return Route(order, ends, order.argsort(), weights)


def choose(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Experts and weights `[T, K]`: softmax, the K largest, normalised over them."""
    chosen, index = softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    return index, chosen / chosen.sum(dim=-1, keepdim=True)


def imbalance(logits: Tensor, ends: Tensor) -> Tensor:
    """How unevenly tokens are spread: logits `[T, E]`, ends `[E]` of the experts' runs. 1 where all experts get as
    much, E where one gets everything; the gradient goes through the probabilities (Switch Transformer, equation 4).
    """
    load = ends.diff(prepend=ends.new_zeros(1)).float() / ends[-1]
    return len(ends) * (load * softmax(logits.float(), dim=-1).mean(dim=0)).sum()


class RoutedFeedForward(nn.Module):
    """Stands in for a dense `mlp`. With a pre-gating router its `route` is set before every forward pass."""

    def __init__(
        self,
        shape: Shape,
        permanent: FullPart | LowRankPart | None,
        experts: FullPart | LowRankPart | None,
        act: Callable[[Tensor], Tensor],
        hidden_size: int,
    ) -> None:
        super().__init__()
        self.routing, self.top_k, self.num_experts = shape.routing, shape.top_k, shape.experts
        self.permanent, self.experts, self.act = permanent, experts, act
        self.gate = nn.Linear(hidden_size, shape.experts, bias=False) if shape.routing == Routing.LAYERS else None
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02)
        self.compute_dtype = torch.float32
        self.route: Any = None
        """A `Route`; Any, so that the compiler treats its tensors as inputs."""
        self.imbalance: Any = None
        """Of the last forward pass, where the layer has a router of its own: see `imbalance`."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1]).to(self.compute_dtype)
        if self.experts is None:
            out = self._permanent(x)
        elif self.permanent is None:
            out = self._routed(x, self._route_of(x))
        else:
            out = self._permanent(x) + self._routed(x, self._route_of(x))
        return out.view(hidden.shape)

    def _permanent(self, x: Tensor) -> Tensor:
        assert self.permanent is not None
        gate, up, down = self.permanent.stack(x.dtype)[:, 0]
        out: Tensor = (self.act(linear(x, gate)) * linear(x, up)) @ down
        return out

    def _route_of(self, x: Tensor) -> Route:
        if self.gate is None:
            route: Route = self.route
            return route
        logits = self.gate(x)
        index, weights = choose(logits, self.top_k)
        route = dispatch(index, self.num_experts, weights)
        self.imbalance = imbalance(logits, route.ends)
        return route

    def _routed(self, x: Tensor, route: Route) -> Tensor:
        assert self.experts is not None
        gate, up, down = self.experts.stack(x.dtype)
        rows = x[route.order // self.top_k]
        inner = self.act(grouped_mm(rows, gate.transpose(1, 2), offs=route.ends)) * grouped_mm(
            rows, up.transpose(1, 2), offs=route.ends
        )
        out = grouped_mm(inner, down, offs=route.ends)[route.back].view(len(x), self.top_k, -1)
        if route.weights is None:
            return out[:, 0]
        return (out * route.weights.to(out.dtype)[..., None]).sum(dim=1)
