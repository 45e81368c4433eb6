"""Reads the dense models that a block model can be made of: a Llama's or Mistral's checkpoint folder or GGUF file.

Of a checkpoint weights pass through one tensor at a time; a GGUF file is loaded whole.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from expertd_engine.checkpoint import Checkpoint, copy_text_files, save_tokenizer
from expertd_engine.errors import ModelError
from expertd_engine.families import Config, build_meta_model, check_rope, load_config

_DENSE_TYPES = ("llama", "mistral")
_GGUF_HEADER_BYTES = 64 * 2**20


class Weights(Protocol):
    """A dense model's parameters by transformers' name, as consecutive pieces of rows."""

    def pieces(self, target: str) -> Iterator[torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class _LoadedWeights:
    """Weights that are in memory already."""

    tensors: Mapping[str, torch.Tensor]

    def pieces(self, target: str) -> Iterator[torch.Tensor]:
        yield self.tensors[target]


def load_dense_config(source: Path) -> Config:
    """The configuration of a dense model that a block model can express. Raises ModelError naming what prevents it."""
    config = _load_gguf_config(source) if is_gguf(source) else load_config(source)
    fault = _fault(config)
    if fault:
        raise ModelError(
            f"{source}: {config.model_type} cannot become a block model: {fault}; allowed are Llama and Mistral models "
            f"without biases and without norms on queries and keys"
        )
    check_rope(config)
    return config


def is_gguf(source: Path) -> bool:
    return source.suffix == ".gguf"


def is_dense(source: Path) -> bool:
    """Whether `source` must be converted before it can be prepared. GGUF files of MoE models are refused later."""
    return is_gguf(source) or load_config(source).model_type in _DENSE_TYPES


def open_weights(source: Path, config: Config, dtype: torch.dtype) -> Weights:
    """The weights of `source`, whose configuration is `config`: a GGUF file's in float32, a checkpoint's in `dtype`.

    Raises ModelError for what cannot be read.
    """
    if not is_gguf(source):
        return Checkpoint(source, build_meta_model(config, dtype), dtype)
    refuse_rope_factors(source)
    # transformers draws bars on stderr, terminal or not; its warnings go through logging and are not lost here.
    with redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, config=config, dtype=torch.float32, local_files_only=True
        )
    return _LoadedWeights(model.state_dict())


def refuse_rope_factors(source: Path) -> None:
    """Raise ModelError if a GGUF file carries Llama 3's frequency factors: transformers passes over them in silence.

    The names of all tensors stand before any data; a search there spares the seconds that parsing the header takes.
    """
    with source.open("rb") as file:
        if b"rope_freqs.weight" in file.read(_GGUF_HEADER_BYTES):
            raise ModelError(
                f"{source}: its rope_freqs cannot be read from a GGUF file; use the safetensors checkpoint"
            )


def write_text_files(source: Path, config: Config, folder: Path) -> None:
    """Give the new checkpoint `folder` the tokenizer and the ids that end a text."""
    if not is_gguf(source):
        copy_text_files(source, folder)
        return
    save_tokenizer(source.parent, folder, gguf_file=source.name)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)


def _load_gguf_config(source: Path) -> Config:
    """The configuration inside a GGUF file. Raises ModelError when transformers cannot read it."""
    if not source.is_file():
        raise ModelError(f"no GGUF file at {source}")
    try:
        return AutoConfig.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError, IndexError) as error:
        raise ModelError(
            f"{source}: transformers cannot read this GGUF file: {' '.join(str(error).split())}"
        ) from error


def _fault(config: Config) -> str | None:
    if config.model_type not in _DENSE_TYPES:
        return f"its type is none of {', '.join(_DENSE_TYPES)}"
    biases = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    return f"it has {biases[0]}" if biases else None
