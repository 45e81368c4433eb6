"""A small random Mixtral in several files, and a small dense Llama: what `prepare` and `convert` are tried on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig, PreTrainedModel

from support.tiny_checkpoints import make_tokenizer, randomise

EXPERTS = 12
"""More than ten, so that plain sorting of names puts experts in the wrong order."""
EXPERT_11 = "model.layers.2.block_sparse_moe.experts.11.w3.weight"
"""A tensor of its last expert, as its checkpoint names it."""
FFN = 128
"""Neurons of the dense model's FFN: divides into 1, 2 or 4 blocks of a multiple of 32."""

_SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip


def make_mixtral(
    folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "100KB", **settings: Any
) -> PreTrainedModel:
    """Write a Mixtral of `EXPERTS` experts a layer into several files, and return it."""
    sizes = {**_SIZES, "intermediate_size": 48, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return _save(folder, MixtralConfig(**{**sizes, **settings}), dtype, shard)


def make_llama(folder: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Write a dense Llama, with a head size of its own and scaled rope, and return it."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0}
    sizes = {**_SIZES, "intermediate_size": FFN, "head_dim": 16, "rope_parameters": rope}
    return _save(folder, LlamaConfig(**{**sizes, **settings}), dtype, "1GB")


def make_dense(folder: Path, kind: str, **settings: Any) -> PreTrainedModel:
    """Write a dense model of another family of transformers, and return it."""
    return _save(
        folder, AutoConfig.for_model(kind, **{**_SIZES, "intermediate_size": FFN, **settings}), torch.float32, "1GB"
    )


def _save(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, shard: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed=0)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return model


@contextmanager
def rewritten(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The checkpoint's tensors, stored again in one file with whatever changes the block makes."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors.update({name: tensor.clone() for name, tensor in load_file(path).items()})
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    yield tensors
    save_file(tensors, folder / "model.safetensors")
