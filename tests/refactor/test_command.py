"""`expertd convert --texts`: from a dense model and folders of text to a checkpoint, and again after a kill."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer

from expertd_engine.convert import main
from expertd_engine.prepare import prepare
from expertd_engine.refactor.command import SHIPPED
from expertd_engine.refactor.corpus import Corpus, read_corpus
from refactor.tiny import corpus, write_texts
from support.tiny_mixtral import make_llama

FEW = ["--steps", "4", "--router-steps", "4", "--rows", "4", "--micro-rows", "2", "--length", "32", "--device", "cpu"]
TEN_MB = 10**7


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_llama(tmp_path / "dense")
    return tmp_path / "dense"


def _convert(model: Path, texts: Path, *options: str) -> int:
    return main([str(model), str(model.parent / "moe"), "--texts", str(texts), *FEW, *options])


def test_from_texts_to_a_store_with_report_and_baselines(model: Path, tmp_path: Path) -> None:
    assert _convert(model, write_texts(tmp_path / "texts", words=96), "--baselines") == 0
    assert prepare(tmp_path / "moe", tmp_path / "store", "float32").index.layers[0].num_experts == 3
    work = tmp_path / "moe.work"
    results = {path.stem for path in (work / "results").iterdir()}
    rates = ("0.0003", "0.0006", "0.0012")
    swept = {f"sweep-{side}-{rate}" for side in ("index", "pruned") for rate in rates}
    assert results == {"dense", "dense-tuned", "final-index-0", "final-pruned-0"} | swept
    report = (work / "report.md").read_text()
    assert "index against pruned, mean of 1 seeds: perplexity ×" in report
    assert all(
        (work / line.split("(")[1].rstrip(")")).is_file() for line in report.splitlines() if line.startswith("![")
    )


def test_a_second_run_uses_what_the_first_left(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "texts")
    assert _convert(model, texts, "--distillation", "0") == 0
    (tmp_path / "moe").rename(tmp_path / "first")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "moe.work" / "results").iterdir()}
    assert _convert(model, texts, "--distillation", "0") == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "moe"))
    assert first.read_bytes() == second.read_bytes()
    second.parent.rename(tmp_path / "second")
    assert _convert(model, texts, "--distillation", "0", "--baselines") == 3, "its rate was not chosen among others"
    assert {path.name for path in (tmp_path / "moe.work" / "results").iterdir()} == {path.name for path in stamps}
    capsys.readouterr()
    make_llama(model, rms_norm_eps=1e-5)
    assert _convert(model, texts, "--distillation", "0") == 3
    assert "was made of something else (changed: dense model): name another --work" in capsys.readouterr().err
    (texts / "domain-1" / "0.txt").write_text("Another")
    assert _convert(model, texts, "--distillation", "0") == 3
    assert "(changed: texts of domain-1): name another --work" in capsys.readouterr().err


def test_experts_can_begin_as_copies_of_a_pruned_models(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_texts(tmp_path / "texts", words=96)
    options = ["--active", "0.25", "--distillation", "0", "--steps", "0", "--pruned-steps"]
    assert _convert(model, texts, *options, "3") == 0
    stems = {path.stem for path in (tmp_path / "moe.work" / "results").iterdir()}
    assert stems == {"dense", "branch-base-0", "branch-final-index-0"}
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    experts = [one for name, one in tensors.items() if ".experts." in name]
    assert experts and all(torch.equal(one[0], one[2]) for one in experts), "not a step has told them apart"
    (tmp_path / "moe").rename(tmp_path / "first")
    assert _convert(model, texts, *options, "2") == 3
    assert "branch-base-0 already, run with steps 3 instead of 2: name another --work" in capsys.readouterr().err


def test_texts_without_domains_are_clustered(model: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", words=1500)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(texts.rglob("*.txt")):
        path.rename(flat / f"{path.parent.name}-{path.name}")
    assert _convert(model, flat, "--experts", "2", "--routing", "index", "--distillation", "0") == 0
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["num_experts"] == 2


@pytest.mark.parametrize(("routing", "kind"), [("heads", "pregated_llama"), ("layers", "qwen2_moe")])
def test_finer_routings(routing: str, kind: str, model: Path, tmp_path: Path) -> None:
    options = ["--routing", routing, "--experts", "8", "--rank", "2", "--distillation", "0"]
    assert _convert(model, write_texts(tmp_path / "texts"), *options) == 0
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (config["model_type"], config["num_experts"], config["num_experts_per_tok"]) == (kind, 8, 2)
    delta = next((tmp_path / "moe.work" / "deltas").iterdir())
    assert main([str(model), str(tmp_path / "merged"), "--trained", str(delta)]) == 0


def test_what_is_wrong_is_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    (empty / "void").mkdir(parents=True)
    short = write_texts(tmp_path / "short", words=24)
    good = write_texts(tmp_path / "texts")
    for texts, options, code, message in (
        (tmp_path / "nowhere", [], 3, "no folder of texts"),
        (empty, [], 3, "holds no text for void"),
        (short, ["--length", "512"], 3, "training tokens: at least 513 are needed"),
        (good, ["--active", "0.1", "--permanent", "0.2"], 2, "0 ≤ permanent < active ≤ 1"),
        (good, ["--seeds", "0"], 2, "--seeds 0 is not allowed: give 1 or more"),
        (good, ["--rows", "5"], 2, "--micro-rows 2 does not divide --rows 5"),
        (good, ["--pruned-steps", "-1"], 2, "--pruned-steps -1 is not allowed"),
        (good, ["--pruned-steps", "9", "--routing", "heads"], 2, "not allowed with --routing heads: only experts of"),
        (good, ["--pruned-steps", "9", "--rank", "4"], 2, "not allowed with --routing index --rank 4"),
        (good, ["--pruned-steps", "9", "--active", "1"], 2, "--active 1.0 leaves no room to prune"),
    ):
        assert _convert(model, texts, *options) == code
        assert message in capsys.readouterr().err
    (tmp_path / "moe").mkdir()
    assert _convert(model, good) == 3
    assert "exists already" in capsys.readouterr().err


def test_held_out_texts_are_other_files_and_the_same_every_time(model: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = write_texts(tmp_path / "texts")
    made = [read_corpus(texts, tokenizer, 257, tmp_path / name, min_tokens=10) for name in ("one", "two")]
    for domain in made[0].domains:
        assert np.array_equal(made[0].held_out[domain], made[1].held_out[domain])
        for part in (made[0].train, made[0].held_out):
            text = tokenizer.decode(part[domain].tolist())
            assert sum(text.startswith(path.read_text()[:40]) for path in (texts / domain).iterdir()) == 1
        assert not np.array_equal(made[0].train[domain][:50], made[0].held_out[domain][:50])
    assert all(item.domain in made[0].domains and 0 < item.begin < len(item.tokens) for item in made[0].cloze)


def test_batches_hold_equal_shares_unless_weighted() -> None:
    even = corpus().batches(4, 16, seed=0)
    assert _drawn(even) == [40, 40, 40]
    heavy = corpus().batches(4, 16, seed=0, weights={"b": 2.0})
    assert _drawn(heavy) == [30, 60, 30]


def test_no_text_comes_again_before_all_of_its_domain_has_come() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    batches = Corpus({"a": tokens}, {"a": tokens}, []).batches(5, 20, seed=0)
    seen = np.concatenate([rows[:, 0] for rows, _ in itertools.islice(batches, 9)])
    assert (np.diff(np.sort(seen)) >= 20).all()
    again = np.concatenate([rows[:, 0] for rows, _ in itertools.islice(batches, 9)])
    assert not set(again.tolist()) <= set(seen.tolist())


def _drawn(batches: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> list[int]:
    labels = np.concatenate([next(batches)[1] for _ in range(30)])
    counts: list[int] = np.bincount(labels, minlength=3).tolist()
    return counts


def test_what_is_shipped_is_small_enough() -> None:
    assert all(path.stat().st_size <= 2.5 * TEN_MB for path in SHIPPED.values())
