"""`expertd bench planner`: what `expertd plan` foretells beside what is then measured, by model, routing and budget.

Speed is of one sequence that continues text in this process, in turns with another whose experts are all there. Memory
is of a daemon whose contexts clients fill, all processes at their peaks, read from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from expertd_engine.bench.foretold import Cell, MemoryRun, report
from expertd_engine.bench.full_daemon import fill
from expertd_engine.bench.perplexity import held_out
from expertd_engine.bench.routing import make_routing, shape_of
from expertd_engine.bench.text_decoder import Decoder, Timed, take_turns
from expertd_engine.config import Config, Size, parse_size
from expertd_engine.errors import BudgetError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.planning.planner import Plan, Request, make_plan, predict_exact
from expertd_engine.planning.profile import Profile
from expertd_engine.profile_file import read_profile

SKIPPED = 4
"""Windows of text that profiles are made from."""
PROMPTS = 16


def planner(
    paths: Sequence[Path],
    routings: Sequence[str],
    budgets: Sequence[str],
    *,
    rounds: int = 5,
    tokens: int = 64,
    memory: bool = True,
) -> str:
    """Measure the profiled stores at `paths`: the report. Raises StoreError for one without profile, or without that
    routing in it, and ConfigError or BudgetError for what is no budget of it. No `routings`: memory alone; nor that
    without `memory`."""
    profiled = [(store, read_profile(store)) for store in map(ExpertStore.open, paths)]
    for _, profile in profiled:
        for request in (_request(text, routing) for text in budgets for routing in routings or ["model"]):
            make_plan(profile, request)  # what cannot be foretold is said before hours are spent
    cells: list[Cell] = []
    memories: list[MemoryRun] = []
    unanchored: dict[str, str] = {}
    for store, profile in profiled:
        for routing in routings:
            found, reason = _Speeds(store, profile, routing).cells(budgets, rounds, tokens)
            cells += found
            unanchored |= {f"{store.index.name}, {routing}": reason} if reason else {}
        memories += memory_runs(store, profile, budgets) if memory else []
    return report(cells, memories, unanchored)


class _Speeds:
    """Decode of one store along one routing."""

    def __init__(self, store: ExpertStore, profile: Profile, routing: str) -> None:
        self._store, self._profile, self._routing = store, profile, routing
        self._windows = held_out(
            Tokenizer.from_file(str(store.path / "tokenizer.json")), SKIPPED + PROMPTS
        )[SKIPPED:]  # fmt: skip
        self._config = Config(
            model=str(store.path),
            threads=profile.box.threads,
            io_threads=profile.box.io_threads,
            prefix_cache=False,
            max_model_len=profile.memory.max_model_len,
            max_sequences=2,
        )

    def cells(self, budgets: Sequence[str], rounds: int, tokens: int) -> tuple[list[Cell], str]:
        """By budget, and why there are no anchors; empty where there are."""
        plans = {text: make_plan(self._profile, _request(text, self._routing)) for text in budgets}
        windows, anchors = ({text: Timed(text) for text in budgets} for _ in range(2))
        with ExitStack() as stack:
            decoder = stack.enter_context(closing(self._decoder(self._config)))
            fits = decoder.holds_all
            if fits:
                decoder.refill()  # before it is asked whether as much is free once more
            anchor, reason = self._anchor()
            if anchor is not None:
                stack.enter_context(closing(anchor))
            for turn in range(rounds):
                if fits:
                    decoder.refill()
                for text, plan in sorted(plans.items(), key=lambda one: -one[1].expert_budget_bytes):
                    # Descending: what stays resident is what serving would have kept.
                    decoder.set_budget(plan.expert_budget_bytes)
                    if anchor is None:
                        decoder.window(["exact"], tokens, windows[text])
                        continue
                    take_turns(turn, tokens, (anchor, "exact", anchors[text]), (decoder, "exact", windows[text]))
        return [self._cell(text, plans[text], windows[text], anchors[text]) for text in budgets], reason

    def _cell(self, text: str, plan: Plan, window: Timed, anchor: Timed) -> Cell:
        profile, curve = self._profile, self._profile.curve(self._routing)
        _, resident_s = predict_exact(profile, curve, profile.expert_bytes)
        label = f"{self._store.index.name}, {self._routing}, {text}"
        return Cell(label, plan, window.means_s, [resident_s / one_s for one_s in anchor.means_s], window.hit_rate)

    def _anchor(self) -> tuple[Decoder | None, str]:
        """One more engine, that keeps every expert; or none, and why."""
        try:
            anchor = self._decoder(replace(self._config, expert_budget=Size(share=1.0)))
        except BudgetError as error:
            return None, str(error)
        anchor.refill()
        return anchor, ""

    def _decoder(self, config: Config) -> Decoder:
        return Decoder(self._store, config, self._windows, make_routing(self._routing, shape_of(self._store.index)))


def _request(budget: str, routing: str = "model") -> Request:
    return Request(expert_budget=parse_size(budget, share_allowed=True), routing=routing)


def memory_runs(store: ExpertStore, profile: Profile, budgets: Sequence[str]) -> list[MemoryRun]:
    """One daemon for each budget: memory that one has had is not always given back."""
    found = []
    threads = {"--threads": profile.box.threads, "--io-threads": profile.box.io_threads}
    for text in budgets:
        plan = make_plan(profile, _request(text))
        flags = {"--expert-budget": plan.expert_budget_bytes, **threads}
        used = fill(store, profile.memory, flags, plan.kv_blocks).peak
        found.append(MemoryRun(f"{store.index.name}, {text}", plan, used))
    return found
