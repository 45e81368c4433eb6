"""How good a model is: perplexity of held-out windows by domain, and the last word of passages. Holds no state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from expertd_engine.refactor.corpus import ClozeItem, Corpus
from expertd_engine.refactor.student import Student

_CLOZE_ROWS = 32


@dataclass(frozen=True)
class Score:
    """Perplexity of each domain, and the share of passages whose last word came out right, all tokens of it."""

    perplexity: Mapping[str, float]
    cloze: float

    @property
    def mean_perplexity(self) -> float:
        """Geometric."""
        return math.exp(sum(map(math.log, self.perplexity.values())) / len(self.perplexity))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean_perplexity": self.mean_perplexity}


def evaluate(student: Student, corpus: Corpus, *, windows: int = 64, length: int = 1024, rows: int = 16) -> Score:
    """Score on at most `windows` held-out windows of `length` tokens a domain and all of the corpus's cloze items."""
    device = student.head.device
    precision: Any = nullcontext()
    if student.compute_dtype != torch.float32:
        precision = torch.autocast(device.type, student.compute_dtype)
    # Windows and passages have many shapes: not worth compiling for.
    with torch.no_grad(), precision, torch.compiler.set_stance("force_eager"):
        perplexity = {
            domain: _perplexity(student, torch.from_numpy(corpus.windows(domain, windows, length)).to(device), rows)
            for domain in corpus.domains
        }
        return Score(perplexity, _cloze(student, corpus.cloze, device))


def _perplexity(student: Student, ids: Tensor, rows: int) -> float:
    total = 0.0
    for some in ids.split(rows):
        logits = student.logits(some[:, :-1]).flatten(0, 1)
        total += float(cross_entropy(logits.float(), some[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / ids[:, 1:].numel())


def _cloze(student: Student, items: Sequence[ClozeItem], device: torch.device) -> float:
    if not items:
        return math.nan
    right = 0
    ordered = sorted(items, key=lambda item: len(item.tokens))
    for begin in range(0, len(ordered), _CLOZE_ROWS):
        some = ordered[begin : begin + _CLOZE_ROWS]
        longest = max(len(item.tokens) for item in some)
        ids = torch.tensor([item.tokens + [0] * (longest - len(item.tokens)) for item in some], device=device)
        guessed = student.logits(ids[:, :-1]).argmax(dim=-1).cpu()
        right += sum(guessed[i, item.begin - 1 : len(item.tokens) - 1].tolist() == item.tokens[item.begin :]
                     for i, item in enumerate(some))  # fmt: skip
    return right / len(items)
