"""Opens the dense model that is to be refactored, and finds its feed-forward blocks. Holds no state.

Any causal language model of transformers whose decoder layers have an `mlp` of `gate_proj`, `up_proj`, `down_proj`
and `act_fn` will do: Llama, Mistral, Qwen2, Qwen3, the Gemmas and their like.
"""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertd_engine.dense_source import is_gguf, refuse_rope_factors
from expertd_engine.errors import ModelError
from expertd_engine.families import Model, check_rope, load_config
from expertd_engine.refactor.origin import weights_fingerprint

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Dense:
    """A dense model with its tokenizer. `layers` are its decoder layers; each has an `mlp`."""

    model: Model
    tokenizer: Any
    layers: list[Any]

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def neurons(self) -> int:
        """Of each layer's FFN."""
        return int(self.layers[0].mlp.gate_proj.weight.shape[0])

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def embedding(self) -> nn.Module:
        module: nn.Module = self.model.get_input_embeddings()
        return module

    @property
    def fast_tokenizer(self) -> Tokenizer:
        tokenizer: Tokenizer = self.tokenizer.backend_tokenizer
        return tokenizer

    @property
    def end_of_text(self) -> int:
        eos = self.tokenizer.eos_token_id
        return 0 if eos is None else int(eos)

    @cached_property
    def fingerprint(self) -> str:
        """Of its config and weights, wherever they were read from."""
        config = self.model.config.get_text_config().to_diff_dict()
        settings = {name: told for name, told in config.items() if name[0] != "_" and name != "transformers_version"}
        return weights_fingerprint(json.dumps(settings, sort_keys=True), dict(self.model.named_parameters()))


def open_dense(source: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Dense:
    """Load a checkpoint folder or GGUF file. Raises ModelError when it cannot be read or has no FFN of a known kind."""
    gguf = is_gguf(source)
    where: dict[str, Any] = {"gguf_file": source.name} if gguf else {}
    folder = source.parent if gguf else source
    if gguf and not source.is_file():
        raise ModelError(f"no GGUF file at {source}")
    if gguf:
        refuse_rope_factors(source)
    else:
        check_rope(load_config(source))
    try:
        with redirect_stderr(io.StringIO()):  # bars; warnings go through logging
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **where)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **where)
    except (ValueError, KeyError, OSError, TypeError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load {source}: {' '.join(str(error).split())}") from error
    layers = find_layers(model)
    return Dense(model.to(device).eval(), tokenizer, layers)


def find_layers(model: Model) -> list[Any]:
    """The decoder layers, each with an FFN that can be cut. Raises ModelError naming what stands in the way."""
    layers = [module for module in model.modules() if _has_ffn(module)]
    expected = int(model.config.get_text_config().num_hidden_layers)
    kind = type(model).__name__
    if len(layers) != expected:
        raise ModelError(
            f"{kind} has no FFN of a known kind in {expected - len(layers)} of {expected} layers: "
            f"allowed is an `mlp` of {', '.join(_PROJECTIONS)} and act_fn in every decoder layer"
        )
    if any(getattr(layer.mlp, name).bias is not None for layer in layers for name in _PROJECTIONS):
        raise ModelError(f"{kind} has biases in its FFNs, which experts cannot express")
    if len({tuple(layer.mlp.gate_proj.weight.shape) for layer in layers}) != 1:
        raise ModelError(f"{kind} has FFNs of different sizes, which experts with aligned indices cannot express")
    return layers


def _has_ffn(module: nn.Module) -> bool:
    mlp = getattr(module, "mlp", None)
    return (
        mlp is not None
        and hasattr(mlp, "act_fn")
        and all(isinstance(getattr(mlp, name, None), nn.Linear) for name in _PROJECTIONS)
    )


def ffn_stack(mlp: Any) -> Tensor:
    """The FFN's weights `[3, neurons, hidden]`: rows of gate and up, columns of down."""
    return torch.stack([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T]).detach()


def activation(mlp: Any, hidden: Tensor) -> Tensor:
    """What goes into `down_proj`, `[..., neurons]`."""
    activated: Tensor = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
    return activated
