"""The seam before the experts: logits and selection of a router, with an optional mask over experts.

Every MoE family of transformers computes softmax and top-k inside its router's own `forward`. Virtual mode,
importance, prediction and traces need the logits and a selection under a mask; a `RouterAdapter` gives both.
`prepare` checks on random input that an adapter without a mask is bit-equal to the module it wraps.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


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
    PREGATED = "pre-gated"
    """routes come from a decoupled router, known before the step."""


class RouterAdapter(Protocol):
    """One layer's router. Shapes: T tokens, H hidden size, E experts, K choices per token."""

    kind: RouterKind
    num_experts: int
    top_k: int

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Router logits `[T, E]` of `hidden` `[T, H]`, in the module's own precision, before any mask."""
        ...

    def select(self, logits: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts `[T, K]` (int64) and their weights `[T, K]` for `logits` `[T, E]`.

        `mask` `[E]` or `[T, E]` (bool, True = may be chosen) restricts the selection; each row must leave at least K.
        Without a mask the result is bit-equal to the module's own.
        """
        ...
