"""Texts as tokens: one folder of plain-text files a domain, split by file into a training and a held-out part.

Owns the tokenised corpus on disk (`DOMAIN.{train,held}.npy`, `DOMAIN.cloze.json`), which later stages read and a second
run finds ready.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from expertd_engine.console import Progress, silent
from expertd_engine.errors import ModelError
from expertd_engine.refactor.origin import Origin, check_origin, files_fingerprint, texts_of, tokenizer_fingerprint

Tokens: TypeAlias = NDArray[np.uint32] | NDArray[np.uint16]

WHOLE = "text"
"""The one domain of a folder that has files and no folders: clusters of activations will stand in for domains."""

_STAMP = "corpus.json"
_HELD_OUT_SHARE = 1 / 16
_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".c", ".h", ".html", ".json", ""})
_CLOZE_CONTEXT_CHARACTERS = 700
_CLOZE_ITEMS = 500
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True, slots=True)
class ClozeItem:
    """`tokens[:begin]` is the context, `tokens[begin:]` the last word."""

    domain: str
    tokens: list[int]
    begin: int


@dataclass(frozen=True)
class Corpus:
    """Domain → tokens, documents one after the other with the end-of-text token between them."""

    train: Mapping[str, Tokens]
    held_out: Mapping[str, Tokens]
    cloze: Sequence[ClozeItem]
    made_of: Origin = field(default_factory=dict)
    """Its texts by domain, its tokenizer, and how it was cut into clusters, if it was."""

    @property
    def domains(self) -> list[str]:
        return sorted(self.train)

    def only(self, domains: Sequence[str]) -> Corpus:
        """Of these domains alone. Raises ModelError when one is missing."""
        missing = sorted(set(domains) - set(self.domains))
        if missing:
            raise ModelError(f"no texts of {', '.join(missing)}: there are {', '.join(self.domains)}")
        train, held = ({name: part[name] for name in domains} for part in (self.train, self.held_out))
        others = {texts_of(name) for name in self.domains} - {texts_of(name) for name in domains}
        made_of = {name: told for name, told in self.made_of.items() if name not in others}
        return Corpus(train, held, [item for item in self.cloze if item.domain in domains], made_of)

    def windows(self, domain: str, count: int, length: int) -> NDArray[np.int64]:
        """At most `count` held-out windows `[N, length]`, evenly spread and not overlapping."""
        tokens = self.held_out[domain]
        fitting = len(tokens) // length
        if fitting == 0:
            raise ModelError(f"the held-out part of {domain!r} has {len(tokens)} tokens: at least {length} are needed")
        starts = np.linspace(0, fitting - 1, min(count, fitting)).round().astype(int) * length
        return np.stack([tokens[start : start + length] for start in starts]).astype(np.int64)

    def batches(
        self, rows: int, length: int, seed: int, weights: Mapping[str, float] | None = None
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Endless `(tokens [rows, length + 1], domain index [rows])`; equal shares of domains unless `weights` says. No
        text comes again before all of its domain's has come."""
        generator = np.random.default_rng(seed)
        shares = np.array([1.0 if weights is None else weights.get(name, 1.0) for name in self.domains])
        owed = np.zeros(len(shares))
        starts = [self._starts(name, length, generator) for name in self.domains]
        while True:
            owed += rows * shares / shares.sum()
            taken = _round_to(owed, rows)
            owed -= taken
            labels = np.repeat(np.arange(len(shares)), taken)
            windows = [self._window(self.domains[i], next(starts[i]), length + 1) for i in labels]
            yield np.stack(windows).astype(np.int64), labels

    def _window(self, domain: str, start: int, length: int) -> Tokens:
        return self.train[domain][start : start + length]

    def _starts(self, domain: str, length: int, generator: np.random.Generator) -> Iterator[int]:
        """Endless beginnings of windows of `length` tokens and the next one, in another cut and order each time."""
        last = len(self.train[domain]) - length - 1
        while True:
            offset = int(generator.integers(0, min(length - 1, last) + 1))
            yield from generator.permutation(np.arange(offset, last + 1, length)).tolist()


def _round_to(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers near `shares` that sum to `total`; the largest remainders are rounded up."""
    whole = np.floor(np.maximum(shares, 0)).astype(np.int64)
    for index in np.argsort(whole - shares, kind="stable")[: max(0, total - int(whole.sum()))]:
        whole[index] += 1
    return whole


def read_corpus(
    texts: Path,
    tokenizer: Tokenizer,
    end_of_text: int,
    folder: Path,
    *,
    min_tokens: int,
    progress: Progress = silent,
) -> Corpus:
    """Tokenise `texts` into `folder`, or read what an earlier run left there.

    Raises ModelError for a missing folder, a domain without text, one whose training part has fewer than `min_tokens`
    tokens, and a `folder` where an earlier run left what was made of other texts or by another tokenizer: that stays.
    """
    files = find_texts(texts)
    made_of = {texts_of(name): files_fingerprint(texts, paths) for name, paths in files.items()}
    made_of["tokenizer"] = tokenizer_fingerprint(tokenizer, end_of_text)
    ready = (folder / _STAMP).is_file()
    if ready:
        check_origin(folder, json.loads((folder / _STAMP).read_text()).get("made_of", {}), made_of)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, paths) in enumerate(files.items()):
            _write(name, paths, tokenizer, end_of_text, folder, -(-_CLOZE_ITEMS // len(files)))
            progress("tokenise", (number + 1) / len(files))
    corpus = _load(folder, sorted(files), made_of)
    for domain, tokens in corpus.train.items():
        if len(tokens) < min_tokens:
            raise ModelError(
                f"domain {domain!r} of {texts} has {len(tokens)} training tokens: at least {min_tokens} are needed"
            )
    if not ready:  # only now: texts of which nothing can be made may be mended in their place
        (folder / _STAMP).write_text(json.dumps({"domains": sorted(files), "made_of": made_of}))
    return corpus


def _load(folder: Path, domains: Sequence[str], made_of: Origin) -> Corpus:
    train, held = (
        {domain: np.load(folder / f"{domain}.{part}.npy", mmap_mode="r") for domain in domains}
        for part in ("train", "held")
    )
    items = [item for domain in domains for item in json.loads((folder / f"{domain}.cloze.json").read_text())]
    return Corpus(train, held, [ClozeItem(**item) for item in items], made_of)


def find_texts(texts: Path) -> dict[str, list[Path]]:
    """Domain → its text files, sorted. Raises ModelError when there is nothing to read."""
    if not texts.is_dir():
        raise ModelError(f"no folder of texts at {texts}")
    folders = sorted(path for path in texts.iterdir() if path.is_dir() and not path.name.startswith("."))
    named = {folder.name: folder for folder in folders} or {WHOLE: texts}
    files = {
        name: sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in _SUFFIXES)
        for name, folder in named.items()
    }
    empty = [name for name, paths in files.items() if not any(path.stat().st_size for path in paths)]
    if empty:
        raise ModelError(
            f"{texts} holds no text for {', '.join(empty)}: allowed are files {', '.join(sorted(_SUFFIXES))}"
        )
    return files


def _write(
    name: str, paths: Sequence[Path], tokenizer: Tokenizer, end_of_text: int, folder: Path, cloze_items: int
) -> None:
    kind = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    held, train = _split(paths)
    for part, texts in (("train", train), ("held", held)):
        ids: list[int] = []
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids += [*encoding.ids, end_of_text]
        np.save(folder / f"{name}.{part}.npy", np.array(ids, kind))
    (folder / f"{name}.cloze.json").write_text(json.dumps(_cloze(name, held, tokenizer, cloze_items)))


def _split(paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Held-out and training texts. By file, spread by a hash of the name; one lone file is cut near its end."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - _HELD_OUT_SHARE))
        return [texts[0][cut:]], [texts[0][:cut]]
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(paths[i].name.encode()).digest())
    total, taken, held = sum(map(len, texts)), 0, set()
    for i in order[:-1]:
        if taken >= total * _HELD_OUT_SHARE:
            break
        held.add(i)
        taken += len(texts[i])
    return [texts[i] for i in sorted(held)], [texts[i] for i in range(len(texts)) if i not in held]


def _cloze(domain: str, texts: Sequence[str], tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """Passages whose last word is to be told, at most one a paragraph, spread over the held-out texts."""
    found = []
    for text in texts:
        position = 0
        for paragraph in re.split(r"\n\s*\n", text):
            words = list(_WORD.finditer(paragraph))
            start = text.find(paragraph, position)
            position = start + len(paragraph)
            if len(words) >= 8 and paragraph[words[-1].start() - 1].isspace():
                found.append((text, start + words[-1].start(), start + words[-1].end()))
    step = max(1, len(found) // count)
    items = (_cloze_item(domain, tokenizer, *one) for one in found[::step])
    return [item for item in items if item is not None][:count]


def _cloze_item(domain: str, tokenizer: Tokenizer, text: str, begin: int, end: int) -> dict[str, Any] | None:
    """None where the word does not begin with a token of its own."""
    first = max(0, begin - _CLOZE_CONTEXT_CHARACTERS)
    encoding = tokenizer.encode(text[first:end], add_special_tokens=False)
    starts = [i for i, (_, stop) in enumerate(encoding.offsets) if stop > begin - first]
    at = encoding.offsets[starts[0]][0] if starts else -1
    if not starts or starts[0] < 8 or text[first + at : begin].strip():
        return None
    return {"domain": domain, "tokens": list(encoding.ids), "begin": starts[0]}
