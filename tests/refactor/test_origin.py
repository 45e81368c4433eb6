"""A work folder goes on with what it was made of alone: the same texts, tokenizer, dense model and windows."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from expertd_engine.errors import ModelError
from expertd_engine.refactor.corpus import Corpus, read_corpus
from expertd_engine.refactor.dense import Dense
from expertd_engine.refactor.pipeline import Workshop
from refactor.tiny import corpus, dense, write_texts
from support.tiny_checkpoints import make_tokenizer

TOKENIZER: Tokenizer = make_tokenizer().backend_tokenizer
END = 257


def _read(texts: Path, folder: Path, tokenizer: Tokenizer = TOKENIZER, end: int = END, least: int = 10) -> Corpus:
    return read_corpus(texts, tokenizer, end, folder, min_tokens=least)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _edit(texts: Path) -> None:
    path = texts / "domain-1" / "0.txt"
    path.write_text("Q" + path.read_text()[1:])


def _grow(texts: Path) -> None:
    (texts / "domain-2" / "2.txt").write_text("one more")


def _trade_domains(texts: Path) -> None:
    (texts / "domain-0").rename(texts / "zoo")


def _rename(texts: Path) -> None:
    """Other files are held out then."""
    (texts / "domain-1" / "0.txt").rename(texts / "domain-1" / "9.txt")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_edit, "changed: texts of domain-1)"),
        (_grow, "changed: texts of domain-2)"),
        (_rename, "changed: texts of domain-1)"),
        (_trade_domains, "missing now: texts of domain-0; new: texts of zoo)"),
    ],
)
def test_other_texts_are_refused_and_nothing_is_lost(change: Callable[[Path], None], told: str, tmp_path: Path) -> None:
    texts, folder = write_texts(tmp_path / "texts"), tmp_path / "corpus"
    _read(texts, folder)
    before = _contents(folder)
    change(texts)
    with pytest.raises(ModelError) as error:
        _read(texts, folder)
    assert told in str(error.value) and "name another --work folder" in str(error.value)
    assert _contents(folder) == before


def test_the_same_texts_elsewhere_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    first = _read(write_texts(tmp_path / "texts"), folder)
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    shutil.copytree(tmp_path / "texts", tmp_path / "moved", copy_function=shutil.copyfile)
    assert _read(tmp_path / "moved", folder).made_of == first.made_of
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps


def test_another_tokenizer_of_as_many_tokens_is_refused(tmp_path: Path) -> None:
    texts, folder = write_texts(tmp_path / "texts"), tmp_path / "corpus"
    told = json.loads(TOKENIZER.to_str())
    vocabulary = told["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = Tokenizer.from_str(json.dumps(told))
    assert other.get_vocab_size() == TOKENIZER.get_vocab_size()
    _read(texts, folder)
    for tokenizer, end in ((other, END), (TOKENIZER, END - 1)):
        with pytest.raises(ModelError, match=r"changed: tokenizer\)"):
            _read(texts, folder, tokenizer, end)


def test_texts_too_short_may_grow(tmp_path: Path) -> None:
    texts, folder = write_texts(tmp_path / "texts"), tmp_path / "corpus"
    with pytest.raises(ModelError, match="at least 5000 are needed"):
        _read(texts, folder, least=5000)
    write_texts(texts, words=1200)
    assert all(len(tokens) >= 5000 for tokens in _read(texts, folder, least=5000).train.values())


def test_a_corpus_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    texts, folder = write_texts(tmp_path / "texts"), tmp_path / "corpus"
    _read(texts, folder)
    (folder / "corpus.json").write_text(json.dumps({"fingerprint": "0", "domains": ["domain-0"]}))
    with pytest.raises(ModelError, match="does not tell what it was made of: name another --work folder"):
        _read(texts, folder)


def test_fewer_domains_are_made_of_fewer_texts(tmp_path: Path) -> None:
    whole = _read(write_texts(tmp_path / "texts"), tmp_path / "corpus")
    assert whole.only(["domain-2"]).made_of.keys() == {"tokenizer", "texts of domain-2"}


# ---------------------------------------------------------------- results


CORPUS = replace(corpus(), made_of={"tokenizer": "1", "texts of a": "2"})


def _shop(folder: Path, model: Dense | None = None, texts: Corpus = CORPUS, length: int = 64) -> Workshop:
    return Workshop(folder, model or dense(), texts, evaluation_windows=1, evaluation_length=length)


def _other(change: Callable[[Dense], object]) -> Dense:
    """The dense model, changed."""
    found = replace(dense(), model=copy.deepcopy(dense().model))
    with torch.no_grad():
        change(found)
    return found


def test_results_are_found_again_for_what_they_were_made_of(tmp_path: Path) -> None:
    _shop(tmp_path).score_dense()
    again = _shop(tmp_path, _other(lambda same: same))
    assert again.result("dense") == _shop(tmp_path).result("dense") is not None


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda at: _shop(at, _other(lambda it: it.model.get_parameter("model.norm.weight").mul_(1.01))),
            "changed: dense model)",
        ),
        (lambda at: _shop(at, _other(lambda it: setattr(it.model.config, "rms_norm_eps", 1e-3))), "dense model)"),
        (lambda at: _shop(at, texts=replace(CORPUS, made_of={**CORPUS.made_of, "texts of a": "3"})), "texts of a)"),
        (lambda at: _shop(at, texts=replace(CORPUS, made_of={**CORPUS.made_of, "clusters": "2"})), "new: clusters)"),
        (lambda at: _shop(at, length=32), "changed: window length)"),
    ],
)
def test_results_of_anything_else_are_refused(make: Callable[[Path], Workshop], told: str, tmp_path: Path) -> None:
    make(tmp_path)  # nothing came of it: whatever comes next may begin here
    _shop(tmp_path).score_dense()
    with pytest.raises(ModelError) as error:
        make(tmp_path)
    assert told in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("left", ["statistics.safetensors", "results/dense.json"])
def test_what_does_not_tell_its_origin_is_refused(left: str, tmp_path: Path) -> None:
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).touch()
    with pytest.raises(ModelError, match="does not tell what it was made of"):
        _shop(tmp_path)
