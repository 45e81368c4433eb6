"""`expertd bench perplexity`: what a model's quantised formats cost, on text that it was not tuned to.

Each format is measured twice: its weights alone, in float32 under plain transformers, and as it is served, by our
engine with its kernels and rounded activations. Ratios are to the float32 store under plain transformers, token by
token on the same text; intervals come from resampling whole windows. llama.cpp's own quantisers of the same weights
stand beside.
"""

from __future__ import annotations

import ast
import math
import os
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeAlias

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from expertd_engine.bench.meant import Change, load_meant
from expertd_engine.bench.report import finish
from expertd_engine.config import Config, parse_size
from expertd_engine.console import Progress, silent
from expertd_engine.errors import EngineError, UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.kernels.formats import QUANTISED, Floats
from expertd_engine.messages import Sampling, Submit, TextInput
from expertd_engine.sources import resolve
from expertd_engine.startup import Engine, start_engine

WINDOW_TOKENS = 512
"""Predictions of one window; the model sees nothing before it."""
PEERS = ("Q4_0",)
"""llama.cpp's formats to compare with, by its own reference quantisers (package `gguf`)."""

_STDLIB = (
    "argparse", "asyncio/events", "collections/__init__", "email/message", "logging/__init__", "random",
    "socketserver", "statistics", "subprocess", "tempfile", "threading", "zipfile", "_pydecimal", "turtle",
)  # fmt: skip
_RESAMPLES = 4000

Losses: TypeAlias = NDArray[np.float64]
"""Negative log-probabilities `[windows, WINDOW_TOKENS]`, in nats."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A perplexity over the base's, and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Measured:
    """`perplexity` and `tokens` are the base's; a ratio's name is the format and how it was run."""

    perplexity: float
    tokens: int
    ratios: Mapping[str, Ratio]


def measure(
    model: str,
    cache_dir: Path,
    formats: Sequence[str] = QUANTISED,
    *,
    windows: int = 40,
    peers: Sequence[str] = PEERS,
    progress: Progress = silent,
) -> Measured:
    """Perplexity of `model` in float32, and of its formats (of experts and dense weights alike) over that.

    What is not yet prepared is prepared. Raises UsageError for more windows than there is text.
    """
    stores = {name: ExpertStore.open(resolve(model, cache_dir, name)) for name in ("float32", *formats)}
    base = stores.pop("float32")
    text = held_out(Tokenizer.from_file(str(base.path / "tokenizer.json")), windows)
    work: dict[str, Callable[[], Losses]] = {"float32": partial(losses_of_weights, base, text)}
    work |= {f"{name} weights": partial(losses_of_weights, store, text) for name, store in stores.items()}
    work |= {f"{peer} weights": partial(losses_of_weights, base, text, _peer(peer)) for peer in peers}
    work |= {f"{name} served": partial(losses_served, store, text) for name, store in stores.items()}
    losses: dict[str, Losses] = {}
    for done, (name, run) in enumerate(work.items()):
        progress(f"perplexity of {name}", done / len(work))
        losses[name] = run()
    base_losses = losses["float32"]
    return Measured(math.exp(base_losses.mean()), base_losses.size, _ratios(losses))


def all_text(tokenizer: Tokenizer) -> list[list[int]]:
    """Windows of `WINDOW_TOKENS` + 1 tokens from what every Python has: its manual's topics and its modules' docstrings
    by turns."""
    parts = ["\n".join(topics[name] for name in sorted(topics)), "\n\n".join(_docstrings())]
    size = WINDOW_TOKENS + 1
    cut = []
    for part in parts:
        ids: list[int] = tokenizer.encode(part).ids
        cut.append([ids[begin : begin + size] for begin in range(0, len(ids) - size + 1, size)])
    return [window for pair in zip(*cut, strict=False) for window in pair]


def held_out(tokenizer: Tokenizer, windows: int) -> list[list[int]]:
    """The first windows of `all_text`. Raises UsageError if that is not enough."""
    turns = all_text(tokenizer)
    if windows > len(turns):
        raise UsageError(f"{windows} windows of {WINDOW_TOKENS} tokens are not to be had: give at most {len(turns)}")
    return turns[:windows]


def losses_of_weights(store: ExpertStore, windows: Sequence[Sequence[int]], change: Change | None = None) -> Losses:
    """Under plain transformers in float32, with the weights that the store's bytes stand for, `change`d if given."""
    model = load_meant(store, change)
    rows = []
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window])
            logits = model(ids[:, :-1], use_cache=False).logits[0]
            rows.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double().numpy())
    return np.stack(rows)


def losses_served(store: ExpertStore, windows: Sequence[Sequence[int]]) -> Losses:
    """By our engine, all experts resident."""
    size = WINDOW_TOKENS + 1
    config = Config(
        model=str(store.path),
        expert_budget=parse_size("100%", share_allowed=True),
        prefix_cache=False,
        max_model_len=size + 1,
        max_sequences=1,
        max_step_tokens=size,
    )
    engine = start_engine(store, config, os.getpid(), lambda stage, fraction: None, lambda runner: runner)
    try:
        return np.stack([_score(engine, number, window) for number, window in enumerate(windows, 1)])
    finally:
        engine.cache.close()


def compare(base: Losses, other: Losses) -> Ratio:
    """The other's perplexity over the base's."""
    differences = (other - base).mean(axis=1)
    chosen = np.random.default_rng(0).integers(len(differences), size=(_RESAMPLES, len(differences)))
    low, high = np.quantile(differences[chosen].mean(axis=1), [0.025, 0.975])
    return Ratio(math.exp(differences.mean()), math.exp(low), math.exp(high))


def perplexity(
    model: str,
    cache_dir: Path,
    formats: Sequence[str] = QUANTISED,
    *,
    windows: int = 40,
    progress: Progress = silent,
) -> str:
    """`measure` as a report: a table, then one JSON object on the last line."""
    measured = measure(model, cache_dir, formats, windows=windows, progress=progress)
    rows = [[name, f"{one.value:.4f}", f"{one.low:.4f}–{one.high:.4f}"] for name, one in measured.ratios.items()]
    title = f"perplexity: {model}, {measured.tokens} tokens in windows of {WINDOW_TOKENS}"
    values = {
        "perplexity": measured.perplexity,
        "tokens": measured.tokens,
        "ratios": {name: asdict(one) for name, one in measured.ratios.items()},
        "device": "cpu",
    }
    notes = [f"float32 under plain transformers: {measured.perplexity:.4f}", ""]
    return finish(title, ["", "× perplexity", "95 %"], rows, notes, values)


def _ratios(losses: Mapping[str, Losses]) -> dict[str, Ratio]:
    base = losses["float32"]
    ratios = {name: compare(base, other) for name, other in losses.items() if name != "float32"}
    if {"int4s weights", "Q4_0 weights"} <= losses.keys():
        ratios["int4s weights over Q4_0"] = compare(losses["Q4_0 weights"], losses["int4s weights"])
    return ratios


def _score(engine: Engine, sequence_id: int, window: Sequence[int]) -> Losses:
    how = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
    engine.core.submit(Submit(sequence_id, [TextInput(list(window))], how), 0.0)
    scored = []
    while engine.core.has_work:
        told = engine.core.step(0.0)
        scored += [entry for output in told.outputs for entry in output.prompt_logprobs or ()]
        for finished in told.finished:
            if finished.error:
                raise EngineError(f"a window could not be scored: {finished.error}")
    return np.array([-entry.logprob for entry in scored if entry is not None])


def _peer(name: str) -> Change:
    kind = gguf.GGMLQuantizationType[name]

    def change(weights: Floats) -> Floats:
        rounded: Floats = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
        return rounded.reshape(weights.shape)

    return change


def _docstrings() -> list[str]:
    """Of some modules of the standard library, read without importing them."""
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for module in _STDLIB:
        path = library / f"{module}.py"
        path = path if path.is_file() else library / module / "__init__.py"  # in later Pythons some are packages
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in found if text]
