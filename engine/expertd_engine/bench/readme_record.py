"""Lets a pre-gated model answer passages of each domain; keeps tokens, experts, and what steps cost on this box.

Owns nothing that lasts but the file it writes.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from expertd_engine.bench.disk import read_bandwidth
from expertd_engine.bench.readme_sim import Costs
from expertd_engine.bench.readme_traces import Recorded
from expertd_engine.config import Config, Size
from expertd_engine.core import Forward, StepResult
from expertd_engine.errors import UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.messages import Sampling, Submit, TextInput
from expertd_engine.refactor.corpus import find_texts
from expertd_engine.request import Sequence as EngineSequence
from expertd_engine.startup import Engine, start_engine
from expertd_engine.step_plan import StepPlan

PROMPT_TOKENS = (16, 96)
ANSWER_TOKENS = (16, 64)
CONTEXT = 256
_DISK_S = 2.0


@dataclass(frozen=True, slots=True)
class Recording:
    """What a model did, and what it cost here."""

    exchanges: list[Recorded]
    costs: Costs


def open_engine(store: ExpertStore, config: Config, watch: Callable[[StepPlan, StepResult], None] | None) -> Engine:
    """An engine in this process; `watch` is told of every step. Raises UsageError for a model of another kind."""

    def watched(runner: Forward) -> Forward:
        def forward(plan: StepPlan) -> StepResult:
            result = runner(plan)
            if watch is not None:
                watch(plan, result)
            return result

        return forward

    engine = start_engine(store, config, os.getpid(), lambda stage, fraction: None, watched)
    finder = engine.runner.pathfinder
    if finder is None or finder.heads != 1:
        engine.cache.close()
        raise UsageError(
            f"{store.path} has no single router ahead of its layers: give a model of `convert --routing index`"
        )
    return engine


def record(
    store: ExpertStore, texts: Path, count: int, config: Config, file: Path, disk_mib_s: int | None = None
) -> Recording:
    """`count` exchanges a domain of `texts`. What an earlier call recorded of the same is read from `file`.

    `disk_mib_s`: of the disk that `store` is read as being on; None for its own."""
    identity = [store.index.store_id, str(texts.resolve()), count, config.threads, config.io_threads, disk_mib_s]
    if file.is_file() and (found := json.loads(file.read_text(encoding="utf-8")))["of"] == identity:
        return Recording([Recorded(**one) for one in found["exchanges"]], Costs(**found["costs"]))
    steps: list[tuple[int, int, float]] = []
    engine = open_engine(store, config, lambda plan, result: steps.append(_cost(plan, result)))
    try:
        exchanges = _answer(engine, _prompts(store, texts, count))
    finally:
        engine.cache.close()
    costs = _fit(steps, store, config)
    saved = {"of": identity, "exchanges": [one.to_json() for one in exchanges], "costs": costs.to_json()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(saved), encoding="utf-8")
    return Recording(exchanges, costs)


def _prompts(store: ExpertStore, texts: Path, count: int) -> list[tuple[str, list[int], int]]:
    """Domain, prompt and length of the answer, in a mixed order."""
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    rng = random.Random(0)
    prompts = []
    for domain, paths in find_texts(texts).items():
        for path in rng.sample(paths, min(count, len(paths))):
            ids = tokenizer.encode(path.read_text(encoding="utf-8")[:8000]).ids
            length = rng.randint(*PROMPT_TOKENS)
            start = rng.randrange(max(1, len(ids) - length))
            prompts.append((domain, ids[start : start + length], rng.randint(*ANSWER_TOKENS)))
    rng.shuffle(prompts)
    return prompts


def _answer(engine: Engine, prompts: Sequence[tuple[str, list[int], int]]) -> list[Recorded]:
    sequences: dict[int, EngineSequence] = {}
    for number, (_, prompt, length) in enumerate(prompts):
        sampling = Sampling(temperature=0, max_tokens=length, ignore_eos=True)
        engine.core.submit(Submit(number, [TextInput(prompt)], sampling), time.monotonic())
    while engine.core.has_work:
        sequences.update(engine.core.scheduler.live)
        engine.core.step(time.monotonic())
    recorded = []
    for number, (domain, prompt, _) in enumerate(prompts):
        sequence = sequences[number]
        assert sequence.paths is not None
        recorded.append(Recorded(domain, prompt, list(sequence.output_token_ids), list(sequence.paths.experts)))
    return recorded


def _cost(plan: StepPlan, result: StepResult) -> tuple[int, int, float]:
    used = {e for c in plan.chunks if c.sequence.paths for e in c.sequence.paths.union(c.start, c.stop)[0]}
    return plan.num_tokens, len(used), result.duration_s


def _fit(steps: Sequence[tuple[int, int, float]], store: ExpertStore, config: Config) -> Costs:
    """What explains the steps' times best, without negative costs. Of steps alike, the fastest quarter counts: what
    else runs on a box only adds."""
    alike: dict[tuple[int, int], list[float]] = {}
    for row_count, expert_count, taken_s in steps:
        alike.setdefault((row_count, expert_count), []).append(taken_s)
    kept = [(*kind, taken_s) for kind, all_s in alike.items() for taken_s in sorted(all_s)[: -(-len(all_s) // 4)]]
    rows, experts, seconds = (np.array(column, np.float64) for column in zip(*kept, strict=True))
    matrix = np.stack([np.ones(len(kept)), rows, experts], axis=1)
    columns = [0, 1, 2]
    while True:
        solution = np.linalg.lstsq(matrix[:, columns], seconds, rcond=None)[0]
        if len(columns) == 1 or solution.min() >= 0:
            break
        columns.pop(int(solution.argmin()))
    found = dict(zip(columns, solution.tolist(), strict=True))
    disk = read_bandwidth(store, config.io_threads, _DISK_S)
    return Costs(
        layers=len(store.index.layers),
        experts=store.index.layers[0].num_experts,
        step_s=found.get(0, 0.0),
        row_s=found.get(1, 0.0),
        expert_s=found.get(2, 0.0),
        read_s=config.io_threads * store.index.record_bytes(0) / disk.bytes_per_s,
        readers=config.io_threads,
    )


def recording_config(max_step_tokens: int, threads: int | None, io_threads: int) -> Config:
    """Everything resident, a few sequences at a time, so that steps differ in rows and experts."""
    return Config(
        expert_budget=Size(share=1.0), max_model_len=CONTEXT, max_sequences=max_step_tokens,
        max_step_tokens=max_step_tokens, threads=threads, io_threads=io_threads,
    )  # fmt: skip
