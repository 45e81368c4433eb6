"""`expertd bench planner`: what `expertd plan` foretells beside what is then measured, by model, routing and budget.

Speed is of one sequence that continues text in this process. Memory is of a daemon whose contexts clients fill, all
processes at their peaks, read from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tokenizers import Tokenizer

from expertd_engine.bench.full_daemon import fill
from expertd_engine.bench.perplexity import held_out
from expertd_engine.bench.report import finish, mebibytes, number, percent
from expertd_engine.bench.routing import make_routing, shape_of
from expertd_engine.bench.text_decoder import Decoder, Timed
from expertd_engine.config import Config, parse_size
from expertd_engine.experts.store import ExpertStore
from expertd_engine.planning.planner import Plan, Request, make_plan
from expertd_engine.planning.profile import Profile
from expertd_engine.profile_file import read_profile

BUDGETS = ("100%", "75%", "50%", "35%", "20%")
"""Descending: a budget is shrunk to, so that what stays resident is what serving would have kept."""
SKIPPED = 4
"""Windows of text that profiles are made from."""
PROMPTS = 16
HEADER = ("model, routing, budget", "foretold tok/s", "measured", "error", "hits foretold", "measured")
MEMORY_HEADER = ("model, budget", "foretold memory", "measured", "over")


@dataclass(slots=True)
class _Speed:
    label: str
    plan: Plan
    timed: Timed

    @property
    def tok_s(self) -> float:
        return 1 / median(self.timed.means_s)

    @property
    def hit_rate(self) -> float:
        return 1 - sum(map(sum, self.timed.missed)) / max(1, self.timed.lookups)

    @property
    def error(self) -> float:
        """Of the plan: above 0, it foretold too much."""
        return self.plan.tok_s / self.tok_s - 1


@dataclass(slots=True)
class MemoryRun:
    """Of one budget: the plan, and what was seen."""

    label: str
    plan: Plan
    used: int

    @property
    def over(self) -> float:
        """Share by which the plan is above the most that was used."""
        return self.plan.memory_bytes / self.used - 1


def planner(
    paths: Sequence[Path], routings: Sequence[str], *, rounds: int = 3, tokens: int = 64, memory: bool = True
) -> str:
    """Measure the profiled stores at `paths`: the report. Raises StoreError for one without profile, or without that
    routing in it. No `routings`: memory alone; nor that without `memory`."""
    profiled = [(store, read_profile(store)) for store in map(ExpertStore.open, paths)]
    for _, profile in profiled:
        for routing in routings:
            make_plan(profile, _request(BUDGETS[0], routing))  # what cannot be foretold is said before hours are spent
    speeds: list[_Speed] = []
    memories: list[MemoryRun] = []
    for store, profile in profiled:
        for routing in routings:
            speeds += _speeds(store, profile, routing, rounds, tokens)
        memories += memory_runs(store, profile) if memory else []
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
                decoder.window(["exact"], tokens, one.timed)
    finally:
        decoder.close()
    return found


def _request(budget: str, routing: str = "model") -> Request:
    return Request(expert_budget=parse_size(budget, share_allowed=True), routing=routing)


# ---------------------------------------------------------------- memory


def memory_runs(store: ExpertStore, profile: Profile) -> list[MemoryRun]:
    """One daemon for each budget: memory that one has had is not always given back."""
    found = []
    threads = {"--threads": profile.box.threads, "--io-threads": profile.box.io_threads}
    for text in BUDGETS:
        plan = make_plan(profile, _request(text))
        flags = {"--expert-budget": plan.expert_budget_bytes, **threads}
        used = fill(store, profile.memory, flags, plan.kv_blocks).peak
        found.append(MemoryRun(f"{store.index.name}, {text}", plan, used))
    return found


# ---------------------------------------------------------------- the report


def _report(speeds: Sequence[_Speed], memories: Sequence[MemoryRun]) -> str:
    rows = [
        (
            one.label, number(one.plan.tok_s), number(one.tok_s), f"{one.error:+.1%}", percent(one.plan.hit_rate),
            percent(one.hit_rate),
        )
        for one in speeds
    ]  # fmt: skip
    notes = [
        *([" · ".join(MEMORY_HEADER)] if memories else []),
        *(
            f"{one.label} · {mebibytes(one.plan.memory_bytes)} · {mebibytes(one.used)} · {one.over:+.1%}"
            for one in memories
        ),
    ]
    values = {
        "command": "planner",
        "speed": [{"run": one.label, "foretold_tok_s": one.plan.tok_s, "tok_s": one.tok_s} for one in speeds],
        "memory": [
            {"run": one.label, "foretold_bytes": one.plan.memory_bytes, "used_bytes": one.used} for one in memories
        ],
        "largest_speed_error": max((abs(one.error) for one in speeds), default=None),
        "memory_over": [one.over for one in memories],
    }
    return finish("plans beside measurements", HEADER, rows, notes, values)
