"""Tiny random models and checkpoints of the families of `tiny_families`.

Each checkpoint is a real folder as `save_pretrained` writes it (original tensor names, one tensor per expert where the
family has that), with a byte-level tokenizer. No parameter keeps a default value: a bias of zero would hide a loader
that forgets it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from support.tiny_families import SPECIAL_TOKENS, make_config


def make_model(family: str, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of that family in eval mode, every parameter and persistent buffer random from `seed`."""
    model = AutoModelForCausalLM.from_config(make_config(family), dtype=torch.float32).eval()
    randomise(model, seed)
    for parameter in model.parameters():
        # Buffers (the selection biases) stay in float32, as the checkpoints of these families hold them.
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Fill all floating tensors of `module`'s state: norms near one, vectors (biases, sinks) and matrices near zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        is_norm = "norm" in name and name.endswith("weight")
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1.0 + 0.1 * noise if is_norm else (0.3 if _is_vector(tensor) else 0.15) * noise)


def _is_vector(tensor: torch.Tensor) -> bool:
    return tensor.numel() == tensor.shape[-1]


def make_checkpoint(family: str, path: Path, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint of `family` with config, weights and tokenizer into the folder `path`."""
    make_model(family, seed, dtype).save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ids 0 to 255 in the byte-level alphabet's order, then `SPECIAL_TOKENS`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad, turn = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, additional_special_tokens=[turn]
    )
