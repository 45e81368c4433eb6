"""The selection rules of MoE routers, as functions of logits and a mask: who decides which experts, with what weight.

One principle holds under a mask: scores are the model's own, over all experts; the mask touches the *selection* alone,
and the weights are the chosen experts' own scores under the model's own normalisation. Without a mask each rule makes
the very calls that the modules of transformers make, in their order, so that results are bit-equal.

Shapes: logits `[T, E]`, mask `[E]` or `[T, E]` (bool, True = may be chosen), experts and weights `[T, K]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

_NEVER = float("-inf")


class RouterKind(StrEnum):
    """How logits become a selection and weights. Closed set; a router of no kind is served in exact mode alone."""

    SOFTMAX_TOPK = "softmax-topk"
    """softmax over all experts, then top-k; renormalised or not (mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2)."""
    TOPK_SOFTMAX = "topk-softmax"
    """top-k of the logits, then softmax over the chosen (gpt_oss, granitemoe)."""
    SIGMOID_GROUPED = "sigmoid-grouped"
    """sigmoid + selection bias, best groups, top-k; weights from the raw scores (deepseek_v3, glm4_moe)."""
    SPARSEMIXER = "sparsemixer"
    """two successive argmaxes with jitter thresholds (phimoe)."""


class Rule(Protocol):
    """Logits and an optional mask to chosen experts and their weights."""

    def __call__(self, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Groups:
    """Experts in `count` equal groups, of which a token may use the `kept` best.

    A group is as good as the sum of its `best` highest selection scores.
    """

    count: int
    kept: int
    best: int

    def inside(self, ranked: Tensor) -> Tensor:
        """Which experts `[T, E]` lie in a kept group, from selection scores `ranked` `[T, E]`."""
        grouped = ranked.view(-1, self.count, ranked.shape[-1] // self.count)
        score = grouped.topk(self.best, dim=-1)[0].sum(dim=-1)
        kept = score.topk(self.kept, dim=-1, sorted=False)[1]
        inside = torch.zeros_like(score, dtype=torch.bool).scatter_(1, kept, True)
        return inside.repeat_interleave(grouped.shape[-1], dim=1)


@dataclass(frozen=True)
class ScoreTopK:
    """Score every expert, choose by score plus bias within the best groups, weigh by the raw score."""

    top_k: int
    score: Callable[[Tensor], Tensor]
    normalise: Callable[[Tensor], Tensor] | None = None
    scale: float = 1.0
    bias: Callable[[], Tensor] | None = None
    groups: Groups | None = None
    ordered: bool = True
    dtype: torch.dtype | None = None
    """Of the weights; None: the logits' own."""

    def __call__(self, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = self.score(logits)
        choice = scores if self.bias is None else scores + self.bias()
        eligible = mask if self.groups is None else self._within_groups(self.groups, choice, mask)
        if eligible is not None:
            choice = choice.masked_fill(~eligible, _NEVER)
        index = choice.topk(self.top_k, dim=-1, sorted=self.ordered)[1]
        weights = scores.gather(1, index)
        if self.normalise is not None:
            weights = self.normalise(weights)
        return index, (weights * self.scale).to(logits.dtype if self.dtype is None else self.dtype)

    def _within_groups(self, groups: Groups, choice: Tensor, mask: Tensor | None) -> Tensor:
        """Eligible experts `[T, E]`. A row whose best groups hold fewer than K allowed experts is free of groups."""
        if mask is None:
            return groups.inside(choice)
        # The row's lowest score, not -inf, stands for a masked expert: a group with one allowed expert can still win.
        inside = groups.inside(torch.where(mask, choice, choice.amin(dim=-1, keepdim=True))) & mask
        enough = inside.sum(dim=-1, keepdim=True) >= self.top_k
        return torch.where(enough, inside, mask)


@dataclass(frozen=True)
class TopKSoftmax:
    """Choose the highest logits, weigh by a softmax over the chosen ones."""

    top_k: int
    softmax_dtype: torch.dtype | None = None
    dtype: torch.dtype | None = None
    """Of the softmax and of the weights; None: the logits' own."""

    def __call__(self, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        choice = logits if mask is None else logits.masked_fill(~mask, _NEVER)
        top, index = choice.topk(self.top_k, dim=-1)
        weights = torch.softmax(top, dim=-1, dtype=self.softmax_dtype)
        return index, weights.to(logits.dtype if self.dtype is None else self.dtype)


@dataclass(frozen=True)
class SparseMixer:
    """Two argmaxes in turn (arXiv 2409.12136, inference); each weighs by a softmax over experts near the best one.

    The module's own second pick treats the first winner as absent; a masked expert is absent from both in the same way.
    """

    jitter: float

    def __call__(self, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        candidates = logits if mask is None else logits.masked_fill(~mask, _NEVER)
        first, first_weight = self._pick(logits, candidates)
        second, second_weight = self._pick(logits, candidates.scatter(-1, first, _NEVER))
        return torch.cat((first, second), dim=-1), torch.cat((first_weight, second_weight), dim=-1)

    def _pick(self, logits: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        best, index = candidates.max(dim=-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * self.jitter
        gates = torch.softmax(candidates.masked_fill(far, _NEVER), dim=-1)
        return index, gates.gather(-1, index)


def softmax_scores(logits: Tensor) -> Tensor:
    """Probabilities `[T, E]` in float32."""
    return torch.softmax(logits, dim=-1, dtype=torch.float32)


def sigmoid_scores(logits: Tensor) -> Tensor:
    """Independent scores `[T, E]` in float32."""
    return logits.float().sigmoid()


def share(weights: Tensor, epsilon: float = 0.0) -> Tensor:
    """Each row of weights `[T, K]` scaled to sum to one."""
    return weights / (weights.sum(dim=-1, keepdim=True) + epsilon)


def share_safe(weights: Tensor) -> Tensor:
    """`share` for scores that may all be zero, with the epsilon that deepseek_v3 uses."""
    return share(weights, 1e-20)
