"""Which native norm or activation a small module is: the one that gives its numbers. Owns no state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expertd_engine.kernels.library import ACTIVATIONS
from expertd_engine.model.activations import PLAIN
from expertd_engine.model.native_abi import NormKind
from expertd_engine.model.native_witness import NotMatched
from expertd_engine.model.numerics import InvariantActivation

_NORM_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def norm_kind(module: nn.Module, weight: Tensor, bias: Tensor | None, eps: float) -> NormKind:
    """What `module` with these parameters `[n]` computes. Raises NotMatched."""
    # Small numbers too, so that the epsilon shows.
    x = torch.linspace(-1, 2, 3 * len(weight)).sin().view(3, -1) * torch.tensor([[1.0], [30.0], [2 * eps**0.5]])
    x = x.to(weight.dtype)
    given = module(x).float()
    x, scale = x.float(), weight.float()
    root = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    answers = {
        NormKind.LAYER: functional.layer_norm(x, x.shape[-1:], scale, None if bias is None else bias.float(), eps)
    }
    if bias is None:
        answers[NormKind.RMS] = x * root * scale
    for kind, answer in answers.items():
        if torch.allclose(given, answer, rtol=_NORM_TOLERANCE[weight.dtype], atol=_NORM_TOLERANCE[weight.dtype]):
            return kind
    raise NotMatched(f"{type(module).__name__} is neither an RMS norm nor a layer norm")


def activation_of(act: Any) -> int:
    """The native activation that gives the numbers of `act`. Raises NotMatched."""
    act = act.act if isinstance(act, InvariantActivation) else act
    x = torch.linspace(-6, 6, 97)
    for name, function in PLAIN.items():
        if torch.allclose(act(x), function(x), atol=1e-6):
            return ACTIVATIONS[name]
    raise NotMatched(f"no kernel has the activation {type(act).__name__}")
