"""A tiny dense model, texts of three domains that differ, and statistics of both: what the refactoring is tried on."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch

from expertd_engine.refactor.corpus import Corpus
from expertd_engine.refactor.dense import Dense, open_dense
from expertd_engine.refactor.export import export
from expertd_engine.refactor.selection import select
from expertd_engine.refactor.shape import Routing, Shape
from expertd_engine.refactor.statistics import Statistics, gather
from expertd_engine.refactor.student import Student
from support.tiny_mixtral import make_dense, make_llama

CPU = torch.device("cpu")
INDEX = Shape(Routing.INDEX, 16, 3, 1, 48, 48)
HEADS = Shape(Routing.HEADS, 16, 8, 2, 14, 16)
LAYERS = Shape(Routing.LAYERS, 16, 8, 2, 14, 16)
LOW_RANK = Shape(Routing.INDEX, 16, 3, 1, 48, 48, rank=4, attention_rank=4)
SHARED = Shape(Routing.LAYERS, 16, 8, 2, 14, 16, rank=4, shared_basis=True, attention_rank=4)


@cache
def dense() -> Dense:
    folder = Path(mkdtemp()) / "dense"
    make_llama(folder)
    return open_dense(folder, CPU)


def make_gemma(folder: Path) -> Dense:
    """A tiny dense Gemma, opened."""
    make_dense(folder, "gemma", hidden_act="gelu_pytorch_tanh", head_dim=16)
    return open_dense(folder, CPU)


@cache
def corpus() -> Corpus:
    """Three domains of bytes that do not meet."""
    generator = np.random.default_rng(0)
    parts = [
        {name: (generator.integers(0, 60, size) + 70 * i).astype(np.uint16) for i, name in enumerate("abc")}
        for size in (6000, 1000)
    ]
    return Corpus(parts[0], parts[1], [])


@cache
def statistics() -> Statistics:
    return gather(dense(), corpus(), windows=2, length=64, sampled_tokens=120)


def make_pregated(folder: Path, shape: Shape) -> None:
    """A checkpoint of that shape, every trained weight of which is off by chance."""
    student = Student(dense(), shape, select(statistics(), shape))
    generator = torch.Generator().manual_seed(1)
    for tensor in student.trained().values():
        tensor += torch.randn(tensor.shape, generator=generator) * 0.05
    export(student.eval(), dense(), folder, torch.float32)


def write_texts(folder: Path, *, domains: int = 3, words: int = 360) -> Path:
    """One folder a domain, two files each, of words that only this domain has."""
    generator = random.Random(0)
    for number in range(domains):
        own = ["".join(generator.choices("abcdefgh"[number::domains] + "z", k=5)) for _ in range(20)]
        for part in range(2):
            path = folder / f"domain-{number}" / f"{part}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (" ".join(generator.choices(own, k=12)) for _ in range(words // 12))
            path.write_text("\n\n".join(lines))
    return folder
