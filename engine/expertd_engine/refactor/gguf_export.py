"""Writes a standard checkpoint that `export` made as a GGUF file in which llama.cpp computes the same. Holds no state.

llama.cpp's own Qwen2-MoE would compute something else: it never normalises the weights of the chosen experts, and wants
heads that together are as wide as the model. Its Granite-MoE is our function: weights normalised over the chosen, a
shared expert without a gate, and four scales that can be 1. It rotates neighbouring rows of queries and keys, where
transformers rotates halves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from expertd_engine.errors import ModelError

_ARCHITECTURE = gguf.MODEL_ARCH.GRANITE_MOE
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ROPES = ("default", "linear")
_TOKENS = "tokenizer.ggml.tokens"


def write_gguf(checkpoint: Path, vocabulary: Path, destination: Path) -> None:
    """Write the checkpoint folder to the new file `destination`, in its own dtype; it passes through memory whole.

    `vocabulary` is a GGUF file whose tokenizer the model has: the dense original's. Raises ModelError for a checkpoint
    that is none of ours with routers in every layer, and for a vocabulary of another size.
    """
    if destination.exists():
        raise ModelError(f"{destination} exists already: name a new file, or remove it first")
    config = _read_config(checkpoint)
    tensors = dict(_renamed(_read_tensors(checkpoint), config))
    partial = destination.with_name(f".{destination.name}.partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[_ARCHITECTURE])
    _describe(writer, config)
    _copy_vocabulary(writer, vocabulary, int(config["vocab_size"]))
    for name, tensor in tensors.items():
        _add(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(destination)


def _read_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "config.json"
    if not path.is_file():
        raise ModelError(f"no checkpoint at {checkpoint}: it has no config.json")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, allowed in (("model_type", ("qwen2_moe",)), ("norm_topk_prob", (True,)), ("hidden_act", ("silu",))):
        if config.get(name) not in allowed:
            raise ModelError(f"{checkpoint}: {name} is {config.get(name)!r}; allowed is {allowed[0]!r}")
    kind = config["rope_parameters"]["rope_type"]
    if kind not in _ROPES:
        raise ModelError(f"{checkpoint}: rope type {kind} cannot be written for llama.cpp: allowed are {_ROPES}")
    return config


def _read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(checkpoint / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{checkpoint}: its model.safetensors cannot be read: {error}") from error
    return tensors


def _describe(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config["head_dim"])
    writer.add_attention_scale(config["head_dim"] ** -0.5)
    for add in (writer.add_embedding_scale, writer.add_residual_scale, writer.add_logit_scale):
        add(1.0)
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _copy_vocabulary(writer: gguf.GGUFWriter, vocabulary: Path, size: int) -> None:
    if not vocabulary.is_file():
        raise ModelError(f"no GGUF file with the vocabulary at {vocabulary}")
    try:
        fields = gguf.GGUFReader(vocabulary).fields
    except (ValueError, IndexError) as error:
        raise ModelError(f"{vocabulary} is no GGUF file: {error}") from error
    tokens = len(fields[_TOKENS].data) if _TOKENS in fields else 0
    if tokens != size:
        raise ModelError(f"{vocabulary} has a vocabulary of {tokens} tokens, the checkpoint one of {size}")
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)


def _renamed(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All weights under llama.cpp's names, as its graph wants them."""
    layers = int(config["num_hidden_layers"])
    names = gguf.get_tensor_name_map(_ARCHITECTURE, layers)
    for layer in range(layers):
        _rebuild_layer(tensors, f"model.layers.{layer}", config)
    for name, tensor in tensors.items():
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None:
            raise ModelError(f"llama.cpp's Granite-MoE has no place for the weight {name}")
        yield known, tensor


def _rebuild_layer(tensors: dict[str, Tensor], layer: str, config: Mapping[str, Any]) -> None:
    """In place: experts stacked, the shared one's weight of a half put into it, rows of queries and keys in pairs."""
    for name in ("q_proj.bias", "k_proj.bias", "v_proj.bias"):
        _take_zeros(tensors, f"{layer}.self_attn.{name}")
    if _take_zeros(tensors, f"{layer}.mlp.shared_expert_gate.weight"):
        shared = f"{layer}.mlp.shared_expert.down_proj.weight"
        tensors[shared] = tensors[shared] * 0.5
    for name in _PROJECTIONS:
        base = f"{layer}.mlp.experts"
        each = [tensors.pop(f"{base}.{expert}.{name}.weight") for expert in range(config["num_experts"])]
        tensors[f"{base}.{name}.weight"] = torch.stack(each)
    for name, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        weight = tensors[f"{layer}.self_attn.{name}.weight"]
        halves = weight.view(config[heads], 2, -1, weight.shape[1])
        tensors[f"{layer}.self_attn.{name}.weight"] = halves.transpose(1, 2).reshape(weight.shape)


def _take_zeros(tensors: dict[str, Tensor], name: str) -> bool:
    """Remove a weight that our exports leave at zero, and say whether it was there."""
    tensor = tensors.pop(name, None)
    if tensor is not None and tensor.any():
        raise ModelError(f"{name} is not zero: only checkpoints that `expertd convert` wrote can be written as GGUF")
    return tensor is not None


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    """Vectors and routers in float32, as llama.cpp's own converter has them."""
    if tensor.dtype == torch.bfloat16 and tensor.ndim > 1 and "ffn_gate_inp" not in name:
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.float().contiguous().numpy())
