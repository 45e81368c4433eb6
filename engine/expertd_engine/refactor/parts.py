"""Trainable FFN weights: full ones, or frozen ones with low-rank deltas. Each owns its parameters.

`stack` is `[3, E, N, H]`: for each of E experts and N neurons the row of gate, the row of up, the column of down.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FullPart(nn.Module):
    """Weights of their own."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights.float().clone())

    def stack(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class LowRankPart(nn.Module):
    """Frozen weights plus `left @ right`; the right factor is each expert's own, or one for all."""

    def __init__(self, weights: Tensor, rank: int, *, shared_basis: bool, generator: torch.Generator) -> None:
        super().__init__()
        _, experts, neurons, hidden = weights.shape
        groups = 1 if shared_basis else experts
        self.base: Tensor
        self.register_buffer("base", weights.clone(), persistent=False)
        self.left = nn.Parameter(torch.zeros(3, experts, neurons, rank, device=weights.device))
        right = torch.randn(3, groups, rank, hidden, generator=generator) * hidden**-0.5
        self.right = nn.Parameter(right.to(weights.device))

    def stack(self, dtype: torch.dtype) -> Tensor:
        return self.base.to(dtype) + self.left.to(dtype) @ self.right.to(dtype)


class LowRankLinear(nn.Module):
    """A frozen linear layer plus `left @ right`."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, inner = linear.weight.shape
        self.base: Tensor
        self.register_buffer("base", linear.weight.detach().clone(), persistent=False)
        self.bias = linear.bias
        self.left = nn.Parameter(torch.zeros(out, rank, device=linear.weight.device))
        right = torch.randn(rank, inner, generator=generator) * inner**-0.5
        self.right = nn.Parameter(right.to(linear.weight.device))

    def merged(self) -> Tensor:
        return self.base + self.left @ self.right

    def forward(self, hidden: Tensor) -> Tensor:
        base = self.base.to(hidden.dtype)
        out = nn.functional.linear(hidden, base, self.bias)
        return out + nn.functional.linear(nn.functional.linear(hidden, self.right), self.left)
