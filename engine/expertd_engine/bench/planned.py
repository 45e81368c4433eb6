"""`expertd bench planner`: what `expertd plan` foretells beside what is then measured, by model, routing and budget.

Speed is of one sequence that continues text in this process. Memory is of a daemon, measured from outside while clients
fill its contexts: all processes, the most of many looks.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import msgspec
from tokenizers import Tokenizer

from expertd_engine.bench.http_load import run_streams
from expertd_engine.bench.perplexity import held_out
from expertd_engine.bench.report import finish, mebibytes, number, percent
from expertd_engine.bench.routing import make_routing, shape_of
from expertd_engine.bench.serve import running_daemon
from expertd_engine.bench.text_decoder import Decoder, Timed
from expertd_engine.config import Config, parse_size
from expertd_engine.experts.store import ExpertStore
from expertd_engine.memory import MemoryMeter
from expertd_engine.planning.planner import Plan, Request, make_plan
from expertd_engine.planning.profile import Profile
from expertd_engine.profile_file import read_profile

BUDGETS = ("100%", "75%", "50%", "35%", "20%")
"""Descending: a budget is shrunk to, so that what stays resident is what serving would have kept."""
SKIPPED = 4
"""Windows of text that profiles are made from."""
PROMPTS = 16
LOOK_EVERY_S = 0.05
HEADER = ("model, routing, budget", "foretold tok/s", "measured", "error", "hits foretold", "measured")
MEMORY_HEADER = ("model, budget", "foretold memory", "measured", "over")


@dataclass(slots=True)
class _Speed:
    label: str
    plan: Plan
    timed: Timed
    hits: int = 0
    lookups: int = 0

    @property
    def tok_s(self) -> float:
        return 1 / median(self.timed.means_s)

    @property
    def error(self) -> float:
        """Of the plan: above 0, it foretold too much."""
        return self.plan.tok_s / self.tok_s - 1


@dataclass(slots=True)
class MemoryRun:
    """Of one budget: the plan, and what was seen."""

    label: str
    plan: Plan
    used: list[int] = field(default_factory=list)

    @property
    def over(self) -> float:
        """Share by which the plan is above the most that was used."""
        return self.plan.memory_bytes / max(self.used) - 1


def planner(paths: Sequence[Path], routings: Sequence[str], *, rounds: int = 3, tokens: int = 64) -> str:
    """Measure the profiled stores at `paths`: the report. Raises StoreError for one without profile, or without that
    routing in it."""
    speeds: list[_Speed] = []
    memories: list[MemoryRun] = []
    for path in paths:
        store = ExpertStore.open(path)
        profile = read_profile(store)
        for routing in routings:
            speeds += _speeds(store, profile, routing, rounds, tokens)
        memories += memory_runs(store, profile)
    return _report(speeds, memories)


def _speeds(store: ExpertStore, profile: Profile, routing: str, rounds: int, tokens: int) -> list[_Speed]:
    found = [
        _Speed(f"{store.index.name}, {routing}, {text}", make_plan(profile, _request(text, routing)), Timed(text))
        for text in BUDGETS
    ]
    windows = held_out(Tokenizer.from_file(str(store.path / "tokenizer.json")), SKIPPED + PROMPTS)[SKIPPED:]
    config = Config(
        model=str(store.path),
        threads=profile.box.threads,
        io_threads=profile.box.io_threads,
        prefix_cache=False,
        max_model_len=profile.memory.max_model_len,
        max_sequences=2,
    )
    decoder = Decoder(store, config, windows, make_routing(routing, shape_of(store.index)))
    try:
        for _ in range(rounds):
            decoder.refill()
            for one in found:
                decoder.set_budget(one.plan.expert_budget_bytes)
                before = decoder.lookups
                decoder.window(["exact"], tokens, one.timed)
                one.hits += decoder.lookups[0] - before[0]
                one.lookups += decoder.lookups[1] - before[1]
    finally:
        decoder.close()
    return found


def _request(budget: str, routing: str = "model") -> Request:
    return Request(expert_budget=parse_size(budget, share_allowed=True), routing=routing)


# ---------------------------------------------------------------- memory


def memory_runs(store: ExpertStore, profile: Profile) -> list[MemoryRun]:
    """One daemon for each budget: memory that one has had is not always given back."""
    found = []
    for text in BUDGETS:
        one = MemoryRun(f"{store.index.name}, {text}", make_plan(profile, _request(text)))
        with running_daemon(_command(store, profile, one.plan), 600.0) as (port, pid), _looks(pid, one.used):
            _fill(store, profile, one.plan, port)
        found.append(one)
    return found


def _command(store: ExpertStore, profile: Profile, plan: Plan) -> list[str]:
    memory = profile.memory
    flags = {
        "--expert-budget": plan.expert_budget_bytes,
        "--kv-budget": plan.kv_blocks * memory.kv_block,
        "--max-model-len": memory.max_model_len,
        "--max-sequences": memory.max_sequences,
        "--max-step-tokens": memory.max_step_tokens,
        "--threads": profile.box.threads,
        "--io-threads": profile.box.io_threads,
    }
    command = [sys.executable, "-m", "expertd_server", "serve", str(store.path), "--port", "0"]
    return command + [part for flag, value in flags.items() for part in (flag, str(value))]


def _fill(store: ExpertStore, profile: Profile, plan: Plan, port: int) -> None:
    """Long prompts in as many streams as there are KV blocks for, so that steps are as large as they get."""
    memory = profile.memory
    prompt = memory.max_model_len - 16
    streams = max(1, min(memory.max_sequences, plan.kv_blocks * memory.block_tokens // memory.max_model_len))
    vocabulary = msgspec.json.decode((store.path / "config.json").read_bytes())["vocab_size"]
    run_streams(port, streams, prompt, 12, vocabulary, 0)


@contextmanager
def _looks(pid: int, used: list[int]) -> Iterator[None]:
    """Keep looking at what the process and its children use while the block runs."""
    meter, over = MemoryMeter(pid), threading.Event()

    def look() -> None:
        while not over.wait(LOOK_EVERY_S):
            used.append(meter.measure().used_bytes)

    used.append(meter.measure().used_bytes)
    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


# ---------------------------------------------------------------- the report


def _report(speeds: Sequence[_Speed], memories: Sequence[MemoryRun]) -> str:
    rows = [
        (
            one.label, number(one.plan.tok_s), number(one.tok_s), f"{one.error:+.1%}", percent(one.plan.hit_rate),
            percent(one.hits / max(1, one.lookups)),
        )
        for one in speeds
    ]  # fmt: skip
    notes = [
        " · ".join(MEMORY_HEADER),
        *(
            f"{one.label} · {mebibytes(one.plan.memory_bytes)} · {mebibytes(max(one.used))} · {one.over:+.1%}"
            for one in memories
        ),
    ]
    values = {
        "command": "planner",
        "speed": [{"run": one.label, "foretold_tok_s": one.plan.tok_s, "tok_s": one.tok_s} for one in speeds],
        "memory": [
            {"run": one.label, "foretold_bytes": one.plan.memory_bytes, "used_bytes": max(one.used)} for one in memories
        ],
        "largest_speed_error": max(abs(one.error) for one in speeds),
        "memory_over": [min(one.over for one in memories), max(one.over for one in memories)],
    }
    return finish("plans beside measurements", HEADER, rows, notes, values)
