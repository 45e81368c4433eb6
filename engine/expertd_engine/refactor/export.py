"""Writes a trained model as a checkpoint folder that transformers loads. Holds no state.

Routers in every layer become a standard Qwen2-MoE checkpoint, with the permanent part as its shared expert; a
pre-gating router becomes a model of our own class (`models`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, Qwen2MoeConfig

from expertd_engine.errors import ModelError
from expertd_engine.publish import publish
from expertd_engine.refactor.dense import Dense
from expertd_engine.refactor.feed_forward import RoutedFeedForward
from expertd_engine.refactor.models import PregatedLlamaConfig
from expertd_engine.refactor.parts import LowRankLinear
from expertd_engine.refactor.shape import Routing, Shape
from expertd_engine.refactor.student import Student

_BACKBONES = ("llama", "mistral", "gemma")
_EMBEDDING = "model.embed_tokens.weight"
_SAME = (
    "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id",
    "eos_token_id",
)  # fmt: skip


def export(student: Student, dense: Dense, destination: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `student`, made of `dense`, to the new folder `destination`.

    Raises ModelError for a backbone that no class of ours can express, and for a model without experts.
    """
    shape = student.shape
    if shape is None or shape.routing == Routing.NONE:
        raise ModelError("a model without experts is not exported: it is the baseline")
    check_backbone(dense)
    with torch.no_grad():
        tensors = dict(_backbone(student))
        if _is_gemma(dense):
            tensors = _as_llama(tensors, dense.hidden_size)
        for layer, block in enumerate(student.blocks):
            tensors.update(_block(f"model.layers.{layer}.mlp", block, shape))
        if student.router is not None:
            tensors.update({f"router.{name}": tensor for name, tensor in student.router.state_dict().items()})
        elif shape.routing == Routing.LAYERS:
            tensors.update(_no_biases(dense))
    config = (
        _pregated_config(dense, student, dtype) if shape.routing.pregated else _standard_config(dense, shape, dtype)
    )
    stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    with publish(destination, needed_bytes=sum(one.nbytes for one in stored.values())) as folder:
        config.save_pretrained(folder)
        dense.tokenizer.save_pretrained(folder)
        ids = {name: getattr(dense.model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ids).save_pretrained(folder)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})


def check_backbone(dense: Dense) -> None:
    """Raises ModelError for a dense model whose refactored form no class of ours can express."""
    kind = dense.model.config.model_type
    if kind not in _BACKBONES:
        raise ModelError(f"a refactored {kind} cannot be exported: allowed are {', '.join(_BACKBONES)}")
    if getattr(dense.model.config, "attention_bias", False):
        raise ModelError(f"a refactored {kind} with attention_bias cannot be exported: allowed are models without")


def _is_gemma(dense: Dense) -> bool:
    return bool(dense.model.config.model_type == "gemma")


def _as_llama(tensors: dict[str, Tensor], hidden_size: int) -> dict[str, Tensor]:
    """A Gemma's weights: its norms' are offsets from 1, and its embeddings are scaled where its head is not."""
    found = {name: 1.0 + tensor if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}
    return {"lm_head.weight": tensors[_EMBEDDING], **found, _EMBEDDING: tensors[_EMBEDDING] * hidden_size**0.5}


def _backbone(student: Student) -> Iterator[tuple[str, Tensor]]:
    """Everything but the FFNs, deltas merged, tied copies left out."""
    inside = {id(one) for block in student.blocks for one in block.parameters()}
    low_rank = {}
    for name, module in student.backbone.named_modules():
        if isinstance(module, LowRankLinear):
            yield f"{name}.weight", module.merged()
            low_rank.update({id(module.left): name, id(module.right): name})
    for name, parameter in student.backbone.named_parameters():
        if id(parameter) not in inside and id(parameter) not in low_rank:
            yield name, parameter


def _block(prefix: str, block: RoutedFeedForward, shape: Shape) -> Iterator[tuple[str, Tensor]]:
    assert block.experts is not None
    gate, up, down = block.experts.stack(torch.float32)
    if shape.routing.pregated:
        yield f"{prefix}.experts.gate_up_proj", torch.cat([gate, up], dim=1)
        yield f"{prefix}.experts.down_proj", down.transpose(1, 2)
    else:
        for expert in range(shape.experts):
            names = (("gate_proj", gate[expert]), ("up_proj", up[expert]), ("down_proj", down[expert].T))
            yield from ((f"{prefix}.experts.{expert}.{name}.weight", tensor) for name, tensor in names)
        assert block.gate is not None
        yield f"{prefix}.gate.weight", block.gate.weight
        # The class weights its shared expert by a sigmoid: of zero, which is one half.
        yield f"{prefix}.shared_expert_gate.weight", torch.zeros(1, gate.shape[-1])
    if block.permanent is not None:
        gate, up, down = block.permanent.stack(torch.float32)[:, 0]
        scale = 1.0 if shape.routing.pregated else 2.0
        names = (("gate_proj", gate), ("up_proj", up), ("down_proj", down.T * scale))
        yield from ((f"{prefix}.shared_expert.{name}.weight", tensor) for name, tensor in names)


def _no_biases(dense: Dense) -> Iterator[tuple[str, Tensor]]:
    """Zeros where a Qwen2 has biases: llama.cpp wants them there, whatever the configuration says."""
    for layer, module in enumerate(dense.layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            width = getattr(module.self_attn, name).weight.shape[0]
            yield f"model.layers.{layer}.self_attn.{name}.bias", torch.zeros(width)


def _common(dense: Dense, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    config = dense.model.config
    heads = int(config.num_attention_heads)
    return {
        **{name: getattr(config, name) for name in _SAME},
        "head_dim": getattr(config, "head_dim", None) or int(config.hidden_size) // heads,
        "tie_word_embeddings": config.tie_word_embeddings and not _is_gemma(dense),
        "intermediate_size": dense.neurons,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.width,
        "shared_expert_intermediate_size": shape.permanent,
        "dtype": dtype,
    }


def _standard_config(dense: Dense, shape: Shape, dtype: torch.dtype) -> Any:
    return Qwen2MoeConfig(
        **_common(dense, shape, dtype), num_hidden_layers=len(dense.layers), norm_topk_prob=True, mlp_only_layers=[],
        decoder_sparse_step=1, qkv_bias=True, use_sliding_window=False, architectures=["Qwen2MoeForCausalLM"],
    )  # fmt: skip


def _pregated_config(dense: Dense, student: Student, dtype: torch.dtype) -> Any:
    assert student.shape is not None and student.router is not None
    router = student.router.shape
    return PregatedLlamaConfig(
        **_common(dense, student.shape, dtype), num_hidden_layers=len(dense.layers) + 1,
        router_heads=router.outputs // student.shape.experts, router_width=router.width,
        router_attention_heads=router.heads, router_inner=router.inner, architectures=["PregatedLlamaForCausalLM"],
    )  # fmt: skip
