"""Losses of the training stages. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

from expertd_engine.refactor.student import capped

_LABEL_SMOOTHING = 0.05


def language_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, teacher: Tensor | None, share: float, softcap: float | None
) -> Tensor:
    """Mean of (1 - share) · cross-entropy + share · cross-entropy to the teacher's distribution.

    `hidden` `[N, H]`, `head` `[V, H]`, `labels` `[N]`, `teacher` logits `[N, V]`. The second term is the KL divergence
    but for the teacher's own entropy, which no weight changes.
    """
    logits = capped(hidden @ head.T, softcap).float()
    loss = cross_entropy(logits, labels)
    if teacher is None or share == 0.0:
        return loss
    taught = (torch.logsumexp(logits, dim=-1) - (softmax(teacher.float(), dim=-1) * logits).sum(dim=-1)).mean()
    return (1.0 - share) * loss + share * taught


def index_loss(logits: Tensor, labels: Tensor, overlaps: Tensor | None, overlap_share: float) -> Tensor:
    """For one index: `logits` `[N, E]` towards the domain of the text (`labels` `[N]`) and, for `overlap_share` of the
    loss, towards the experts that hold most of what each token activates (`overlaps` `[N, E]`, any scale).
    """
    loss = cross_entropy(logits.float(), labels, label_smoothing=_LABEL_SMOOTHING)
    if overlaps is None:
        return loss
    return (1.0 - overlap_share) * loss + overlap_share * distillation(logits, overlaps)


def distillation(logits: Tensor, scores: Tensor) -> Tensor:
    """KL but for a constant: `logits` `[..., E]` towards softmax of the standardised `scores` `[..., E]`."""
    scores = scores.float()
    deviation = scores.std(dim=-1, keepdim=True).clamp(min=1e-9)
    target = softmax((scores - scores.mean(dim=-1, keepdim=True)) / deviation, dim=-1)
    return -(target * log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()
