"""A real engine inside the test process: what the engine's main does, without its socket."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd_engine.config import Config, parse_size
from expertd_engine.experts.store import ExpertStore
from expertd_engine.messages import ExpertMode, Finished, Output, Sampling, SequenceStats, Submit, TextInput
from expertd_engine.model.native_model import NativeModel
from expertd_engine.model.step_model import ModuleModel
from expertd_engine.model.trial import Trial
from expertd_engine.startup import Engine, start_engine


def make_config(**options: Any) -> Config:
    """A configuration for tests: small batch limits, budgets given as text."""
    for name in ("expert_budget", "host_budget", "memory_budget", "kv_budget"):
        if isinstance(options.get(name), str):
            options[name] = parse_size(options[name], share_allowed=name in ("expert_budget", "host_budget"))
    return Config(**{"max_model_len": 256, "warm_restart": False, **options})


def without_trials(patch: pytest.MonkeyPatch) -> None:
    """Let engines start without trial steps, which have tests of their own."""
    patch.setattr(Trial, "is_invariant", lambda self: True)
    patch.setattr(Trial, "largest_step_bytes", lambda self, *sizes: 0)


@contextmanager
def running_engine(store: Path, **options: Any) -> Iterator[Engine]:
    """An engine over `store`; its transfer threads end with the block."""
    config = make_config(**options)
    engine = start_engine(ExpertStore.open(store), config, os.getpid(), lambda stage, fraction: None, lambda r: r)
    try:
        yield engine
    finally:
        engine.cache.close()


@dataclass
class Generated:
    token_ids: list[int] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    finished: Finished | None = None


class Logits:
    """Every step's logits, in order, whoever computes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[torch.Tensor] = []
        for model in (NativeModel, ModuleModel):
            monkeypatch.setattr(model, "forward", self._recording(model.forward))

    def _recording(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def recorded(*args: Any) -> torch.Tensor:
            logits = forward(*args)
            self.steps.append(logits.clone())
            return logits

        return recorded


Ask = tuple[list[int], ExpertMode, float]
"""Prompt, mode, and the gate weight that others may answer for."""


def submit_of(sequence_id: int, prompt: Sequence[int], sampling: Sampling, **more: Any) -> Submit:
    return Submit(sequence_id, [TextInput(list(prompt))], sampling, **more)


def stats_of(generated: Generated) -> SequenceStats:
    """Of a sequence that had all its tokens."""
    assert generated.finished is not None and generated.finished.reason == "length", generated.finished
    return generated.finished.stats


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling], *, first_id: int = 1
) -> list[Generated]:
    """Submit all prompts at once and step until each has ended; results in the order of `prompts`."""
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    asked = enumerate(zip(prompts, each, strict=True), first_id)
    return answers(engine, [submit_of(sequence_id, prompt, how) for sequence_id, (prompt, how) in asked])


def ask(engine: Engine, asks: Sequence[Ask], sampling: Sampling, *, first_id: int = 1) -> list[Generated]:
    """As `generate`, each prompt in its mode."""
    submits = [
        submit_of(sequence_id, prompt, sampling, mode=mode, max_substituted_mass=limit)
        for sequence_id, (prompt, mode, limit) in enumerate(asks, first_id)
    ]
    return answers(engine, submits)


def answers(engine: Engine, submits: Iterable[Submit]) -> list[Generated]:
    """Submit all at once and step until each has ended; results in their order."""
    results = {}
    for submit in submits:
        results[submit.sequence_id] = Generated()
        engine.core.submit(submit, 0.0)
    collect(engine, results)
    return list(results.values())


def collect(engine: Engine, results: dict[int, Generated]) -> None:
    """Step until nothing is left, filling `results` by sequence id."""
    while engine.core.has_work:
        step(engine, results)


def step(engine: Engine, results: dict[int, Generated]) -> None:
    """One step; what it brings is added to `results`."""
    told = engine.core.step(0.0)
    for output in told.outputs:
        results[output.sequence_id].token_ids += output.token_ids
        results[output.sequence_id].outputs.append(output)
    for finished in told.finished:
        assert results[finished.sequence_id].finished is None, "a sequence ended twice"
        results[finished.sequence_id].finished = finished
