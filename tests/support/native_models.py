"""Tiny models of every family, ready for the native path: real dense weights, stand-ins for the routed experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expertd_engine.families import find_experts
from expertd_engine.kernels.library import Pool
from expertd_engine.model.attention import ATTENTION_NAME, ShapeRecorder, paged_attention
from expertd_engine.model.kv_storage import LayerShape
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.moe import EXPERTS_NAME, MoELayer, experts_function
from expertd_engine.model.native_witness import stood_in
from expertd_engine.model.numerics import make_invariant
from expertd_engine.model.step_routes import StepRoutes
from support.tiny_checkpoints import make_model

CONTEXT = 256


class ExactExperts(MoELayer):
    """A function of input, ids and weights whose every operation is elementwise: a row's bits are its own."""

    def __init__(self) -> None:
        self.step = None

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        self.compute(hidden.float(), top_k_index, top_k_weights.float(), out)
        return out.to(hidden.dtype)

    def compute_or_prepare(
        self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, out: Tensor, *, may_prepare: bool = True
    ) -> None:
        self.compute(hidden, top_k_index, top_k_weights, out)

    def compute(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, out: Tensor) -> None:
        for choice in range(top_k_index.shape[1]):
            share = top_k_weights[:, choice] * (1.0 + top_k_index[:, choice] / 8)
            out += hidden * share[:, None]


class NoSource:
    """`StepRoutes` wants one; stand-in experts never ask it."""

    def lease(self, *_: object, **__: object) -> None:
        raise AssertionError("stand-in experts have no records")


def no_routes(rows: int) -> StepRoutes:
    return StepRoutes(rows, NoSource())  # type: ignore[arg-type]  # never asked


def load_tiny(family: str, pool: Pool | None, dtype: torch.dtype = torch.float32, seed: int = 4) -> LoadedModel:
    """The model as `load_model` gives it, without a store."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, experts_function)
    model = make_model(family, seed, dtype)
    model.set_attn_implementation(ATTENTION_NAME)
    model.set_experts_implementation(EXPERTS_NAME)
    modules = [module for _, module in find_experts(model)]
    for module in modules:
        module._parameters.clear()
        module.expertd_layer = ExactExperts()  # type: ignore[assignment]  # a plain attribute, not a submodule
    make_invariant(model, dtype)
    model.requires_grad_(False)
    return LoadedModel(
        model=model,
        moe_modules=modules,
        dtype=dtype,
        dense_bytes=0,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        context_tokens=CONTEXT,
        eos_token_ids=(),
        float32_sigmoids=True,
        fallbacks=[],
        pool=pool,
    )


def eager_model(family: str, seed: int = 4) -> PreTrainedModel:
    """The same model as transformers runs it, but for the experts."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, experts_function)
    model = make_model(family, seed)
    model.set_attn_implementation("eager")
    model.set_experts_implementation(EXPERTS_NAME)
    for _, module in find_experts(model):
        module.expertd_layer = ExactExperts()  # type: ignore[assignment]  # a plain attribute, not a submodule
    return model


def shapes_of(loaded: LoadedModel) -> Sequence[LayerShape]:
    recorder = ShapeRecorder()
    zeros = torch.zeros(1, 4, dtype=torch.long)
    with torch.inference_mode(), stood_in(loaded):
        loaded.model(input_ids=zeros, position_ids=zeros, use_cache=False, expertd_batch=recorder)
    return recorder.in_order()
