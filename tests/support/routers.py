"""Routers of every family as transformers makes them, and adapters of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from expertd_engine.families import find_experts
from expertd_engine.model.router_kinds import RouterAdapter, adapt_router
from support.tiny_checkpoints import make_model, randomise
from support.tiny_families import COMMON, FAMILIES, OTHERS

ROWS = 48

EVERY = [*FAMILIES, *OTHERS]


def other_model(family: str, **changes: Any) -> nn.Module:
    """Of one of `OTHERS`, with these settings changed."""
    config = AutoConfig.for_model(family, **{**COMMON, **OTHERS[family], **changes})
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed=1)
    return model


@cache
def model_of(family: str) -> nn.Module:
    """In float32, made once."""
    return other_model(family) if family in OTHERS else make_model(family, seed=1)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return dict(find_experts(model))


def adapters_of(model: nn.Module) -> list[RouterAdapter]:
    """Of all its MoE layers that have one."""
    adapters = [adapt_router(model, name) for name in experts_of(model)]
    assert adapters
    return [adapter for adapter in adapters if adapter is not None]


def last_adapter(family: str) -> RouterAdapter:
    """Of the last MoE layer."""
    return adapters_of(model_of(family))[-1]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden_for(adapter: RouterAdapter, rows: int = ROWS, seed: int = 2) -> Tensor:
    """Random inputs `[rows, H]`."""
    return torch.randn(rows, adapter.hidden_size, generator=generator(seed))
