"""What routers and the norms before them are as matrices: so that a later layer can be asked about an earlier state.

Found by probing, so that any family will do whose routers are linear and whose norms scale each channel: what is not,
as a probe shows, is no gate here, and such a model is not foreseen this way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from expertd_engine.families import Model
from expertd_engine.model.router_kinds import RouterAdapter, adapt_router

Floats: TypeAlias = NDArray[np.float32]

_NORMS = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_attention_norm", "ffn_norm", "norm2")
"""What a decoder layer calls the norm before its experts."""
_CLOSE = 2e-2
"""Largest difference, relative to the largest value, between a probed map and the module: bf16 rounds by 2^-8."""


class NotLinear(Exception):
    """A router or norm is no such matrix; the text names it."""


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """One MoE layer: normalised state = core × scale + shift; logits = weight @ state + bias."""

    weight: Floats
    """`[E, H]`"""
    bias: Floats
    """`[E]`"""
    scale: Floats
    shift: Floats
    """`[H]` both."""

    def seen_from(self, earlier: Gate) -> tuple[Floats, Floats]:
        """Matrix `[E, H]` and bias `[E]` that give this layer's logits of a state as `earlier` normalised it."""
        ratio = np.divide(self.scale, earlier.scale, out=np.zeros_like(self.scale), where=np.abs(earlier.scale) > _TINY)
        matrix = self.weight * ratio
        return matrix, self.bias + self.weight @ self.shift - matrix @ earlier.shift


_TINY = 1e-6


def find_gates(model: Model, modules: list[str]) -> list[Gate]:
    """The gates of MoE layers whose experts modules have these names. Raises NotLinear."""
    return [_gate(model, name) for name in modules]


@torch.inference_mode()
def _gate(model: Model, name: str) -> Gate:
    router = adapt_router(model, name)
    if not isinstance(router, RouterAdapter):
        raise NotLinear(f"the router of {name} is of no known kind")
    return Gate(*_linear(router, name), *norm_before(model, name, router))


@torch.inference_mode()
def norm_before(model: Model, name: str, router: RouterAdapter) -> tuple[Floats, Floats]:
    """Scale and shift `[H]` of the norm whose output the router sees; 1 and 0 where none is found. Raises NotLinear."""
    norm = _norm_before(model, name)
    if norm is None:
        return np.ones(router.hidden_size, np.float32), np.zeros(router.hidden_size, np.float32)
    return _affine(norm, router.hidden_size, router.hidden_dtype, name)


def _linear(router: RouterAdapter, name: str) -> tuple[Floats, Floats]:
    size, dtype = router.hidden_size, router.hidden_dtype
    bias = router.logits(torch.zeros(1, size, dtype=dtype))[0].float()
    weight = (router.logits(torch.eye(size, dtype=dtype)).float() - bias).T
    x = torch.randn(8, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    real, ours = router.logits(x).float(), x.float() @ weight.T + bias
    if (real - ours).abs().max() > _CLOSE * real.abs().max():
        raise NotLinear(f"the router of {name} is not linear")
    return weight.contiguous().numpy(), bias.numpy()


def _norm_before(model: Model, name: str) -> nn.Module | None:
    """The norm whose output the router of these experts sees; None where no such name is found."""
    parent = name
    while "." in parent:
        parent = parent.rpartition(".")[0]
        layer = model.get_submodule(parent)
        for candidate in _NORMS:
            found = getattr(layer, candidate, None)
            if isinstance(found, nn.Module):
                return found
    return None


def _affine(norm: nn.Module, size: int, dtype: torch.dtype, name: str) -> tuple[Floats, Floats]:
    """Scale and shift: a vector of ±1 is its own norm, of mean 0 and variance 1 alike."""
    signs = torch.ones(size)
    signs[1::2] = -1
    above, below = norm(signs[None].to(dtype))[0].float(), norm(-signs[None].to(dtype))[0].float()
    scale, shift = (above - below) / 2 * signs, (above + below) / 2
    x = torch.randn(1, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    real = norm(x)[0].float()
    rms = x.float() / x.float().square().mean().sqrt()
    centred = (x.float() - x.float().mean()) / x.float().std(correction=0)
    error = min(float((real - core[0] * scale - shift).abs().max()) for core in (rms, centred))
    if error > _CLOSE * float(real.abs().max()):
        raise NotLinear(f"the norm before {name} does more than scale")
    return scale.numpy(), shift.numpy()
