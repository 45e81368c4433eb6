"""The demo model three ways: stores to serve, the dense original, and the block checkpoint under plain transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer

from expertd_engine.convert import convert_blocks
from expertd_engine.errors import ExpertdError
from expertd_engine.sources import find_source, resolve

CACHE = Path(os.environ.get("EXPERTD_CACHE_DIR", "~/.cache/expertd")).expanduser()

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a little",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "Q: What is 12 times 12?\nA:",
    "In 1969, the first human being",
    "To make a cup of tea, you first",
    "The chemical symbol for gold is",
    "import numpy as np\n\nx =",
    "Shakespeare wrote the play",
    "The largest planet in the solar system is",
    "Dear Sir or Madam,\n\nI am writing to",
    "A dog is an animal that",
    "SELECT name FROM users WHERE",
    "The opposite of hot is",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Monday, Tuesday, Wednesday,",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "List of European countries: Germany, France, Italy,",
]


_reader, _name_map = cache(gguf.GGUFReader), cache(gguf.get_tensor_name_map)


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Parse each GGUF file once a process: for one model transformers does it three times, each time for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", _reader)
        patch.setattr(gguf, "get_tensor_name_map", _name_map)
        yield


@cache
@gguf_read_once()
def demo_store(dtype: str) -> Path:
    """The demo's store in `dtype`, made on first use in the user's cache; skips where the demo cannot be had."""
    try:
        return resolve("demo", CACHE, dtype)
    except ExpertdError as error:
        pytest.skip(f"the demo model is not here: {error}")


@cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo_store("bf16") / "tokenizer.json"))


def encode(text: str) -> list[int]:
    ids: list[int] = demo_tokenizer().encode(text).ids
    return ids


@cache
@gguf_read_once()
def dense_model(dtype: torch.dtype) -> Any:
    """The original dense model under plain transformers."""
    from transformers import AutoModelForCausalLM

    source = find_source("demo").path
    if source.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.eval()


def block_checkpoint(folder: Path, dtype: str) -> Path:
    """The demo as a standard Mixtral checkpoint of 16 blocks."""
    target = folder / f"blocks-{dtype}"
    if not target.exists():
        convert_blocks(find_source("demo").path, target, 16, dtype)
    return target
