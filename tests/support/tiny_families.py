"""Tiny configurations of every MoE family we promise, with every switch on that changes what a layer computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    AutoConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    FlexOlmoConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from expertd_engine.families import SERVABLE

TINY_FAMILIES = SERVABLE - {"pregated_llama"}
"""Families of transformers' own; ours is made by conversion and tested there."""
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<turn>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
WINDOW = 6
"""Tokens that a sliding-window layer sees; prompts longer than this tell a window from none."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_DENSE_FFN, _EXPERT_FFN = 96, 32


def _mixtral() -> PreTrainedConfig:
    return MixtralConfig(
        **COMMON, intermediate_size=_EXPERT_FFN, num_local_experts=8, num_experts_per_tok=2, sliding_window=WINDOW
    )


def _qwen2_moe() -> PreTrainedConfig:
    # Of the windowed and full layers that alternate, none is told of the window: only transformers' masks have it.
    return Qwen2MoeConfig(
        **COMMON,
        intermediate_size=_DENSE_FFN,
        moe_intermediate_size=_EXPERT_FFN,
        shared_expert_intermediate_size=48,
        num_experts=12,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        qkv_bias=True,
        use_sliding_window=True,
        sliding_window=WINDOW,
    )


def _qwen3_moe() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **COMMON,
        intermediate_size=_DENSE_FFN,
        moe_intermediate_size=_EXPERT_FFN,
        head_dim=24,
        num_experts=12,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=WINDOW,
        tie_word_embeddings=True,
    )


def _olmoe() -> PreTrainedConfig:
    return OlmoeConfig(
        **COMMON,
        intermediate_size=_EXPERT_FFN,
        num_experts=12,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        attention_bias=True,
        clip_qkv=0.8,
    )


def _flex_olmo() -> PreTrainedConfig:
    return FlexOlmoConfig(
        **COMMON,
        intermediate_size=_EXPERT_FFN,
        num_experts=9,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        attention_bias=True,
    )


_MLA: dict[str, Any] = {
    **COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": _DENSE_FFN,
    "moe_intermediate_size": _EXPERT_FFN,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
    },
}


def _deepseek_v2() -> PreTrainedConfig:
    return DeepseekV2Config(
        **_MLA, topk_method="group_limited_greedy", n_group=3, topk_group=2, routed_scaling_factor=1.7, mlp_bias=True
    )


def _deepseek_v3() -> PreTrainedConfig:
    return DeepseekV3Config(**_MLA, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True)


def _gpt_oss() -> PreTrainedConfig:
    # Four layers, so that windowed and full attention each come twice; sinks and biases are always on.
    return GptOssConfig(
        **{**COMMON, "num_hidden_layers": 4},
        intermediate_size=_EXPERT_FFN,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=WINDOW,
        attention_bias=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 256,
        },
    )


def _granitemoe() -> PreTrainedConfig:
    return GraniteMoeConfig(
        **COMMON,
        intermediate_size=_EXPERT_FFN,
        num_local_experts=10,
        num_experts_per_tok=3,
        attention_bias=True,
        embedding_multiplier=6.0,
        logits_scaling=2.0,
        residual_multiplier=0.6,
        attention_multiplier=0.3,
    )


def _phimoe() -> PreTrainedConfig:
    return PhimoeConfig(
        **COMMON,
        intermediate_size=_EXPERT_FFN,
        num_local_experts=8,
        num_experts_per_tok=2,
        # Wide enough that several experts share the softmax of one pick.
        router_jitter_noise=0.3,
        sliding_window=WINDOW,
        attention_bias=True,
        lm_head_bias=True,
    )


def _glm4_moe() -> PreTrainedConfig:
    return Glm4MoeConfig(
        **COMMON,
        intermediate_size=_DENSE_FFN,
        moe_intermediate_size=_EXPERT_FFN,
        head_dim=24,
        partial_rotary_factor=0.5,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=1.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        attention_bias=True,
        use_qk_norm=True,
    )


def _ernie4_5_moe() -> PreTrainedConfig:
    return Ernie4_5_MoeConfig(
        **COMMON,
        intermediate_size=_DENSE_FFN,
        moe_intermediate_size=_EXPERT_FFN,
        moe_num_experts=12,
        moe_k=4,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        use_bias=True,
        tie_word_embeddings=True,
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "flex_olmo": _flex_olmo,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "granitemoe": _granitemoe,
    "phimoe": _phimoe,
    "glm4_moe": _glm4_moe,
    "ernie4_5_moe": _ernie4_5_moe,
}

_SPLIT = {
    "moe_intermediate_size": _EXPERT_FFN,
    "intermediate_size": _DENSE_FFN,
    "num_experts_per_tok": 3,
    "head_dim": 16,
}
_GROUPED = {**_SPLIT, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.5, "norm_topk_prob": True}
_WINDOWED = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
OTHERS: dict[str, dict[str, Any]] = {
    "hunyuan_v1_moe": {
        "num_experts": 8,
        "moe_topk": 3,
        "num_shared_expert": 1,
        "head_dim": 16,
        "intermediate_size": _EXPERT_FFN,
        "attention_bias": True,
    },
    "minimax_m2": {**_SPLIT, "intermediate_size": _EXPERT_FFN, "num_local_experts": 8, "rotary_dim": 8},
    "exaone_moe": {**_GROUPED, **_WINDOWED, "num_experts": 12, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "solar_open": {**_GROUPED, "n_routed_experts": 12, "n_shared_experts": 1},
    "afmoe": {
        **_SPLIT,
        **_WINDOWED,
        "num_experts": 8,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "route_scale": 1.5,
    },
    "cohere2_moe": {
        **_WINDOWED,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 1,
        "intermediate_size": _EXPERT_FFN,
        "logit_scale": 1.0,
    },
    "mellum": {**_SPLIT, **_WINDOWED, "num_experts": 8},
    "granitemoeshared": {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": _EXPERT_FFN},
    "dots1": {**_GROUPED, "n_routed_experts": 12, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "glm4_moe_lite": {
        **_MLA,
        **_GROUPED,
        "head_dim": 8,
    },
}
"""Settings, beside `COMMON`, of families that share all but details with one of `FAMILIES`."""


def make_config(family: str) -> PreTrainedConfig:
    """The tiny configuration of a family of `FAMILIES` or `OTHERS`."""
    if family in FAMILIES:
        return FAMILIES[family]()
    return AutoConfig.for_model(family, **{**COMMON, **OTHERS[family]})
