"""The pre-gating router: one causal block on token embeddings that never sees the backbone's hidden states.

Its attention goes through transformers' interface with a layer number and cache of its own, so that whatever runs the
backbone incrementally (a cache, paged KV blocks) runs the router the same way. Owns its weights, no embedding table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_ROPE_BASE = 10000.0


@dataclass(frozen=True, slots=True)
class RouterShape:
    """`outputs` logits a token: experts for one index, layers · experts for a head a layer."""

    embedding: int
    outputs: int
    width: int = 256
    heads: int = 4
    inner: int = 512

    @classmethod
    def beside(cls, hidden: int, outputs: int) -> RouterShape:
        """A router that costs a backbone of this hidden size little: 256 wide, less beside a small one."""
        width = min(256, max(16, hidden // 16 * 8))
        return cls(hidden, outputs, width, inner=2 * width)


class _Attention(nn.Module):
    """What transformers' attention functions look for on a module stands here as they name it."""

    is_causal = True
    num_key_value_groups = 1
    config: Any
    """The whole model's, set by who owns it; nothing here reads it."""

    def __init__(self, shape: RouterShape, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads = shape.heads
        self.head_dim = shape.width // shape.heads
        self.scaling = self.head_dim**-0.5
        self.qkv_proj = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: Any, kind: str, **extra: Any) -> Tensor:
        heads = self.qkv_proj(x).view(*x.shape[:-1], 3 * self.heads, self.head_dim).transpose(1, 2)
        query, key, value = heads.split(self.heads, dim=1)
        query, key = _rotate(query, positions), _rotate(key, positions)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[kind]
        out, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **extra)
        projected: Tensor = self.o_proj(out.reshape(*x.shape).contiguous())
        return projected


class PregatingRouter(nn.Module):
    """Token embeddings `[B, T, embedding]` to logits `[B, T, outputs]`; token t's depend on tokens up to t alone."""

    def __init__(self, shape: RouterShape, layer_idx: int) -> None:
        super().__init__()
        self.shape = shape
        self.in_proj = nn.Linear(shape.embedding, shape.width, bias=False)
        self.attention_norm = nn.Parameter(torch.ones(shape.width))
        self.attention = _Attention(shape, layer_idx)
        self.mlp_norm = nn.Parameter(torch.ones(shape.width))
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)
        self.head_norm = nn.Parameter(torch.ones(shape.width))
        self.head = nn.Linear(shape.width, shape.outputs, bias=False)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Any = None,
        attention: str = "sdpa",
        **extra: Any,
    ) -> Tensor:
        """`positions` `[B or 1, T]`; `mask`, `cache`, `attention`, `extra` as for the backbone's attention layers."""
        x = self.in_proj(_unit(embeddings))
        x = x + self.attention(_unit(x) * self.attention_norm, positions, mask, cache, attention, **extra)
        x = x + self.down_proj(silu(self.up_proj(_unit(x) * self.mlp_norm)))
        logits: Tensor = self.head(_unit(x) * self.head_norm)
        return logits


def _unit(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], eps=1e-6)


def angles(positions: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[..., half]` for `positions` `[...]`, in float32."""
    frequencies = _ROPE_BASE ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    turned = positions[..., None].float() * frequencies
    return turned.cos(), turned.sin()


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions for `x` `[B, heads, T, D]`, in float32."""
    half = x.shape[-1] // 2
    cos, sin = angles(positions[:, None], half)
    first, second = x.float().split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
