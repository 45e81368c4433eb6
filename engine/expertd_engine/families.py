"""Which models can be served, by name and reason; and how a model without weights is built. Owns no state.

Sequences of a batch are flattened into one row, so a layer may see other tokens through its attention alone, and
positions must not depend on who else is in the batch: families that break this go wrong without any error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from expertd_engine.errors import ModelError

Config: TypeAlias = Any
"""A transformers `PreTrainedConfig`; the library publishes no types."""
Model: TypeAlias = Any
"""A transformers `PreTrainedModel`; the library publishes no types."""

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
"""Formats of weights that are plain numbers, as the user names them."""

SERVABLE = frozenset({
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
    "gpt_oss", "granitemoe", "hunyuan_v1_moe", "mellum", "minimax_m2", "mixtral", "olmoe", "phimoe", "pregated_llama",
    "qwen2_moe", "qwen3_moe", "solar_open",
})  # fmt: skip
"""Model types whose flattened batches, past their windows, were compared with transformers' eager attention."""

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Left out are `dynamic` and `longrope`, whose frequencies follow the longest sequence of the batch."""

_WINDOW_IN_MASK_ALONE = frozenset({"phimoe", "qwen2_moe"})
"""Model types whose masks have the sliding window while their attention calls are not told of it."""

_OWN_EXPERTS = frozenset({
    "dbrx", "jetmoe", "llama4", "llama4_text", "longcat_flash", "nllb_moe", "nllb-moe", "step3p7",
    "switch_transformers",
})  # fmt: skip
_RECURRENT = frozenset({
    "bailing_hybrid", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "minimax", "nemotron_h", "qwen3_next",
    "qwen3_5_moe", "zamba", "zamba2",
})  # fmt: skip
_OTHER_INPUTS = ("vision_config", "audio_config", "thinker_config", "text_config")


def load_config(source: Path) -> Config:
    """The checkpoint's transformers configuration. Raises ModelError when there is none that transformers knows."""
    if not (source / "config.json").is_file():
        raise ModelError(f"{source} is not a checkpoint: it has no config.json")
    if b'"pregated_llama"' in (source / "config.json").read_bytes():
        import expertd_engine.refactor.models  # noqa: F401  # our own class: transformers learns of it here
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelError(f"{source / 'config.json'}: transformers cannot read it: {_one_line(error)}") from error


def refuse_unservable(config: Config) -> None:
    """Raise ModelError, naming the model type and the reason, when its configuration alone rules the model out."""
    reason = _fault_of_kind(config) or _fault_of_layers(config)
    if reason:
        raise ModelError(f"models of type {config.model_type!r} cannot be served: {reason}")
    check_rope(config)


def check_rope(config: Config) -> None:
    """Raise ModelError for position encodings that depend on the batch."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for one in nested or [parameters]:
        kind = one.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"{config.model_type} with rope type {kind!r} cannot be served: allowed are {_names(ROPE_TYPES)} "
                f"(others depend on the longest sequence of the batch)"
            )


def untold_window(config: Config, layer: int) -> int | None:
    """Tokens that attention layer `layer` sees though its call names no window; None where calls say what they mean."""
    if config.model_type not in _WINDOW_IN_MASK_ALONE:
        return None
    kinds = getattr(config, "layer_types", None)
    windowed = kinds is None or kinds[layer] == "sliding_attention"
    return config.sliding_window if windowed else None


def build_meta_model(
    config: Config,
    dtype: torch.dtype,
    *,
    attn_implementation: str = "eager",
    experts_implementation: str = "eager",
) -> Model:
    """The model with its parameters on the meta device and its buffers real, in eval mode.

    Weights that the model ties are separate until `tie_weights()` is called after loading. Raises ModelError.
    """
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                experts_implementation=experts_implementation,
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"transformers cannot build a {config.model_type} of this config: {_one_line(error)}"
        ) from error
    return model.eval()


def build_servable_model(config: Config, dtype: torch.dtype) -> Model:
    """The meta model of a MoE family that we serve; ModelError by name and reason for all others."""
    refuse_unservable(config)
    model = build_meta_model(config, dtype)
    if not find_experts(model):
        hint = "; `expertd convert` makes one of it" if config.model_type in ("llama", "mistral") else ""
        raise ModelError(f"{type(model).__name__} cannot be served: it is a dense model without experts{hint}")
    if config.model_type not in SERVABLE:
        raise ModelError(
            f"models of type {config.model_type!r} cannot be served: that their batches may be flattened has not been "
            f"checked; checked are {_names(SERVABLE)}"
        )
    return model


def find_experts(model: Model) -> list[tuple[str, torch.nn.Module]]:
    """`(dotted name, module)` of every experts module behind transformers' experts interface, in forward order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "is_concatenated")
    ]


def expert_parameter_names(model: Model) -> set[str]:
    """Full names of the parameters that go into records and not into the dense file."""
    return {
        f"{name}.{own}" for name, module in find_experts(model) for own, _ in module.named_parameters(recurse=False)
    }


def weight_dtypes(model: Model, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name → dtype of everything in the state dict, as `from_pretrained(dtype=dtype)` would have it.

    What the class declares in `_keep_in_fp32_modules_strict` stays float32; its `_keep_in_fp32_modules` concerns
    float16 alone (transformers, `PreTrainedModel._get_dtype_plan`).
    """
    strict = [pattern.replace("*", ".*") for pattern in getattr(model, "_keep_in_fp32_modules_strict", None) or ()]
    kept = re.compile("|".join(strict)) if strict and dtype == torch.bfloat16 else None
    return {
        name: torch.float32 if kept and kept.search(name) and tensor.is_floating_point() else tensor.dtype
        for name, tensor in model.state_dict().items()
    }


def dense_dtype_plan(model: Model, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name → dtype of every dense weight that is stored: experts' parameters and tied copies are left out."""
    left_out = expert_parameter_names(model) | tied_names(model).keys()
    return {name: kind for name, kind in weight_dtypes(model, dtype).items() if name not in left_out}


def tied_names(model: Model) -> dict[str, str]:
    """Name of each weight that is another one's copy → that other one's name."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _fault_of_kind(config: Config) -> str | None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoders are served"
    if kind in _OWN_EXPERTS:
        return "its experts do not go through transformers' experts interface"
    if kind in _RECURRENT:
        return "some of its layers carry a recurrent state; only attention layers are served"
    if any(getattr(config, name, None) is not None for name in _OTHER_INPUTS):
        return "it takes images or other inputs than text"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model of this type"
    return None


def _fault_of_layers(config: Config) -> str | None:
    others = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if others:
        return f"it has layers of type {_names(others)}; allowed are {_names(LAYER_TYPES)}"
    return None


def _names(names: set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(names))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
