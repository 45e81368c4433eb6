"""The yardstick of formats: the weights a store stands for, under plain transformers, on text that never changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from expertd_engine.bench import perplexity as measuring
from expertd_engine.bench.meant import load_meant
from expertd_engine.bench.perplexity import compare, held_out, perplexity
from expertd_engine.errors import UsageError
from expertd_engine.kernels.formats import Floats
from expertd_engine.prepare import prepare
from support.tiny_checkpoints import make_checkpoint, make_tokenizer


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "ernie4_5_moe"])
def test_a_plain_store_means_the_checkpoint(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "checkpoint", seed=2)
    store = prepare(tmp_path / "checkpoint", tmp_path / "store", "float32")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).state_dict()
    meant = load_meant(store).state_dict()
    assert meant.keys() == expected.keys()
    assert all(torch.equal(meant[name], tensor) for name, tensor in expected.items())


def test_a_change_meets_every_matrix_that_would_be_quantised(tmp_path: Path) -> None:
    make_checkpoint("mixtral", tmp_path / "checkpoint", seed=2)
    store = prepare(tmp_path / "checkpoint", tmp_path / "store", "float32")

    def zero(weights: Floats) -> Floats:
        return np.zeros_like(weights)

    kept = {name for name, tensor in load_meant(store, zero).state_dict().items() if tensor.any()}
    assert kept == {name for name in kept if "norm" in name or name.endswith("mlp.gate.weight")} != set()


def test_ratios_and_their_intervals() -> None:
    generator = np.random.default_rng(0)
    base = generator.random((20, 8)) + 1
    same = compare(base, base)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    worse = compare(base, base + np.log(1.1))
    assert worse.value == pytest.approx(1.1) == worse.low == worse.high
    noisy = compare(base, base + generator.normal(0.05, 0.1, base.shape))
    assert noisy.low < noisy.value < noisy.high


def test_formats_of_a_model_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "WINDOW_TOKENS", 40)
    make_checkpoint("mixtral", tmp_path / "checkpoint", seed=2)
    report = perplexity(str(tmp_path / "checkpoint"), tmp_path / "cache", ["int8", "int4s"], windows=4)
    told = json.loads(report.splitlines()[-1])
    ratios = {name: one["value"] for name, one in told["ratios"].items()}
    names = ["int8 weights", "int4s weights", "Q4_0 weights", "int8 served", "int4s served", "int4s weights over Q4_0"]
    assert told["tokens"] == 160 and list(ratios) == names and all(name in report for name in names)
    assert abs(ratios["int8 weights"] - 1) < abs(ratios["int4s weights"] - 1) < 0.5
    assert abs(ratios["int8 served"] - 1) < 0.1


def test_more_text_than_there_is_is_refused(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"1000000 windows of 512 tokens are not to be had: give at most \d+"):
        held_out(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), 1_000_000)
