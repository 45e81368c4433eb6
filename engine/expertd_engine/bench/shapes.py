"""The configurations of published MoE models, written out, so that a model of random weights has a real one's shape.

Numbers are those of each model's config.json on its hub page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from expertd_engine.errors import UsageError
from expertd_engine.families import Config


@dataclass(frozen=True, slots=True)
class Cut:
    """A smaller model of the same shape, for trials: fewer layers or tokens, widths and heads divided by `narrow`."""

    layers: int | None = None
    vocabulary: int | None = None
    narrow: int = 1


def make_config(shape: str, cut: Cut | None = None) -> Config:
    """The transformers configuration of `shape`. Raises UsageError for one that is not known, or a cut that is none."""
    if shape not in SHAPES:
        raise UsageError(f"shape {shape!r} is not known: choose from {', '.join(SHAPES)}")
    architecture, make, options = SHAPES[shape]
    options = dict(options)
    cut = cut or Cut()
    if cut.layers is not None:
        options["num_hidden_layers"] = _checked("layers", cut.layers, options["num_hidden_layers"])
    if cut.vocabulary is not None:
        options["vocab_size"] = _checked("vocabulary", cut.vocabulary, options["vocab_size"])
        options |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    for name in _WIDTHS & options.keys():
        if cut.narrow > 1:
            options[name] = _divided(name, options[name], cut.narrow)
    return make(**options, architectures=[architecture], dtype="bfloat16")


_COLUMNS = 32
"""Widths stay multiples of it: a group of the quantised formats."""
_HEADS = frozenset({"num_attention_heads", "num_key_value_heads"})
_WIDTHS = frozenset({"hidden_size", "intermediate_size", "moe_intermediate_size"}) | _HEADS


def _checked(name: str, value: int, full: int) -> int:
    if not 1 <= value <= full:
        raise UsageError(f"{name} {value} is not allowed: give 1 to {full}, the shape's own")
    return value


def _divided(name: str, value: int, narrow: int) -> int:
    if name in _HEADS:
        return max(1, value // narrow)
    if value % (narrow * _COLUMNS):
        raise UsageError(f"narrow {narrow} is not allowed: it must divide {name} {value} into multiples of {_COLUMNS}")
    return value // narrow


SHAPES: dict[str, tuple[str, Callable[..., Config], dict[str, Any]]] = {
    "olmoe-1b-7b": ("OlmoeForCausalLM", OlmoeConfig, {
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "tie_word_embeddings": False, "pad_token_id": 1,
        "bos_token_id": None, "eos_token_id": 50279,
    }),
    "qwen3-30b-a3b": ("Qwen3MoeForCausalLM", Qwen3MoeConfig, {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
    }),
    "mixtral-8x7b": ("MixtralForCausalLM", MixtralConfig, {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "num_local_experts": 8,
        "num_experts_per_tok": 2, "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2,
    }),
    "gpt-oss-20b": ("GptOssForCausalLM", GptOssConfig, {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "sliding_window": 128, "num_local_experts": 32, "num_experts_per_tok": 4,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False, "eos_token_id": 200002, "pad_token_id": 199999,
    }),
}  # fmt: skip
"""Name → class of the model, class of its configuration, and what that is given."""
