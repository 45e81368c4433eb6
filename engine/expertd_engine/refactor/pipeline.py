"""Runs the jobs of a conversion in a work folder: statistics, training runs, scores. Owns that folder.

Everything finished is found again: `corpus/`, `statistics.safetensors`, `results/NAME.json`, `trained/NAME.pt`, and
`checkpoints/NAME.pt` of what was interrupted; `origin.json` tells of what all that was made, and anything else is
refused. Several processes, one a GPU, may share the jobs of one folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from expertd_engine.console import Progress, silent
from expertd_engine.errors import ModelError
from expertd_engine.refactor.corpus import Corpus
from expertd_engine.refactor.delta import save_delta
from expertd_engine.refactor.dense import Dense
from expertd_engine.refactor.evaluation import evaluate
from expertd_engine.refactor.origin import settle
from expertd_engine.refactor.selection import select
from expertd_engine.refactor.shape import Shape
from expertd_engine.refactor.statistics import Statistics, gather_into
from expertd_engine.refactor.student import Student
from expertd_engine.refactor.training import Recipe, Trainer
from expertd_engine.refactor.upcycle import upcycled

TUNED = "dense-tuned"
_STATISTICS = "statistics.safetensors"
_POLL_S = 0.5
_EVALUATION_WINDOWS = 48


@dataclass(frozen=True, slots=True)
class Job:
    """One training run and its scores. `shape` None tunes the dense model itself. `teacher` is `dense`, the name of
    another job, or None. `best_of` are jobs whose best learning rate this one takes. `begin` is a kept job whose
    weights this one goes on from: of the same shape, or a pruned model's that experts begin as copies of.
    """

    name: str
    shape: Shape | None
    recipe: Recipe
    teacher: str | None = None
    best_of: tuple[str, ...] = ()
    begin: str | None = None
    keep: bool = False
    """Whether the trained weights are wanted after the run."""


@dataclass(frozen=True)
class Workshop:
    """What all jobs share. `compute` is the dtype that training computes in. ModelError for a folder whose results are
    of another dense model, another corpus or windows of another length."""

    folder: Path
    dense: Dense
    corpus: Corpus
    compute: torch.dtype = torch.float32
    evaluation_windows: int = _EVALUATION_WINDOWS
    evaluation_length: int = 1024
    progress: Progress = silent

    def __post_init__(self) -> None:
        length = str(self.evaluation_length)
        origin = {"dense model": self.dense.fingerprint, "window length": length, **self.corpus.made_of}
        settle(self.folder, origin, (_STATISTICS, "results/*.json"))

    def statistics(self) -> Statistics:
        """Of the dense model on the corpus; gathered once."""
        path = self.folder / _STATISTICS
        return gather_into(path, self.dense, self.corpus, length=self.evaluation_length, progress=self.progress)

    def result(self, name: str) -> dict[str, Any] | None:
        """What a finished job left, else None."""
        path = self._path("results", name, "json")
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def score_dense(self, name: str = "dense") -> None:
        """The untouched dense model's scores, as a result among others."""
        if self.result(name) is None:
            self._write(name, {"score": self._score(self._student(None, 0))})

    def run(self, job: Job) -> dict[str, Any]:
        """The job's result, computed unless there is one. Raises TrainingError; what was learned stays. ModelError
        where a job of that name has run otherwise."""
        self.check(job)
        found = self.result(job.name)
        if found is not None:
            return found
        if job.best_of:
            job = replace(job, recipe=replace(job.recipe, learning_rate=self.best_rate(job.best_of)))
        student = self._begun(job)
        untrained = self._score(student, quick=True)
        checkpoint = self._path("checkpoints", job.name, "pt")
        trainer = Trainer(
            student, self.corpus, job.recipe, dense=self.dense, teacher=self._teacher(job.teacher),
            checkpoint=checkpoint, progress=lambda stage, done: self.progress(f"{job.name}: {stage}", done),
        )  # fmt: skip
        curve = trainer.run()
        routing = _routing(student, self.corpus, self.evaluation_length)
        scores = {"untrained": untrained, "score": self._score(student)}
        found = self._write(job.name, {"job": _plain(job), **scores, "curve": asdict(curve), "routing": routing})
        if job.keep:
            torch.save(student.trained(), self._path("trained", job.name, "pt"))
            if student.shape is not None and student.shape.rank is not None:
                save_delta(student, self._path("deltas", job.name, "safetensors"), job.name)
        checkpoint.unlink(missing_ok=True)
        return found

    def best_rate(self, names: Sequence[str]) -> float:
        """The learning rate of the best among finished jobs; waits for jobs that other processes run."""
        results = [self._awaited(partial(self.result, name)) for name in names]
        best = min(results, key=lambda one: float(one["score"]["mean_perplexity"]))
        return float(best["job"]["recipe"]["learning_rate"])

    def trained(self, job: Job) -> Student:
        """A finished job's model; it must have been kept. Waits for jobs that other processes run."""
        path = self._path("trained", job.name, "pt")
        self._awaited(lambda: self.result(job.name) if path.is_file() else None)
        student = self._begun(job)
        student.load_trained(torch.load(path, map_location=student.head.device, weights_only=True))
        return student

    def _begun(self, job: Job) -> Student:
        """The job's model before its first step."""
        if job.begin is None:
            return self._student(job.shape, job.recipe.seed)
        ran = self._awaited(partial(self.result, job.begin))["job"]
        before = None if ran["shape"] is None else Shape.from_json(ran["shape"])
        student = self.trained(Job(job.begin, before, Recipe(0, 0.0, seed=ran["recipe"]["seed"]), begin=ran["begin"]))
        if job.shape is None or job.shape == before:
            return student
        grown = upcycled(student, job.shape, self.dense, self.statistics(), job.recipe.seed)
        grown.compute_in(self.compute)
        return grown

    def check(self, job: Job) -> None:
        """Raise ModelError where a job of that name has run otherwise, but for its learning rate if that was chosen."""
        found = self.result(job.name)
        if found is None:
            return
        ran = {**found["job"], **found["job"]["recipe"]}
        free = {"compile", "micro_rows", *(("learning_rate",) if job.best_of else ())}
        asked = {**_plain(job), **asdict(job.recipe), "best_of": list(job.best_of)}
        differs = {
            name: value
            for name, value in ran.items()
            if name not in free and name not in ("recipe", "keep") and asked.get(name) != value
        }
        if differs:
            told = ", ".join(f"{name} {value} instead of {asked.get(name)}" for name, value in differs.items())
            raise ModelError(
                f"{self.folder} has results of {job.name} already, run with {told}: name another --work folder, or "
                f"remove this one"
            )

    def _teacher(self, name: str | None) -> Student | None:
        if name is None:
            return None
        teacher = self._student(None, 0) if name == "dense" else self.trained(Job(name, None, Recipe(0, 0.0)))
        teacher.freeze(self.compute)
        return teacher

    def _student(self, shape: Shape | None, seed: int) -> Student:
        selection = None if shape is None else select(self.statistics(), shape, seed)
        student = Student(self.dense, shape, selection, seed)
        student.compute_in(self.compute)
        return student

    def _score(self, student: Student, *, quick: bool = False) -> dict[str, Any]:
        windows = max(1, self.evaluation_windows // 6) if quick else self.evaluation_windows
        return evaluate(student, self.corpus, windows=windows, length=self.evaluation_length).to_json()

    def _awaited(self, find: Callable[[], Any]) -> Any:
        while (found := find()) is None:
            time.sleep(_POLL_S)
        return found

    def _path(self, kind: str, name: str, suffix: str) -> Path:
        path = self.folder / kind / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        path = self._path("results", name, "json")
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.rename(path)
        return result


def _plain(job: Job) -> dict[str, Any]:
    return {**asdict(job), "shape": None if job.shape is None else job.shape.to_json()}


def _routing(student: Student, corpus: Corpus, length: int, windows: int = 8) -> dict[str, list[float]]:
    """Domain → share of its held-out tokens that each index gets; empty without a single-index router."""
    if student.router is None or student.shape is None or student.shape.top_k != 1:
        return {}
    shares = {}
    with torch.no_grad():
        for domain in corpus.domains:
            ids = torch.from_numpy(corpus.windows(domain, windows, length)).to(student.head.device)
            index = student.route_logits(ids).argmax(dim=-1).flatten()
            shares[domain] = (torch.bincount(index, minlength=student.shape.experts) / index.numel()).tolist()
    return shares


def check_budget(corpus: Corpus, length: int) -> None:
    """Raise ModelError unless every domain has a training and a held-out window of `length` tokens."""
    for domain in corpus.domains:
        for part, tokens in (("training", corpus.train[domain]), ("held-out", corpus.held_out[domain])):
            if len(tokens) <= length:
                raise ModelError(
                    f"the {part} part of {domain!r} has {len(tokens)} tokens: more than {length} are needed"
                )
