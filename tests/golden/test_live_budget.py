"""Budgets that change while sixteen streams run: nobody is lost, no logit changes, memory comes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expertd_engine import startup
from expertd_engine.live_budget import LiveBudget
from expertd_engine.memory import MemoryUse
from expertd_engine.messages import Sampling, SetBudget
from expertd_engine.planning.startup_plan import GROWTH_BYTES, plan_memory
from expertd_engine.prepare import prepare
from expertd_engine.pressure import PressureReader, PressureSource
from expertd_engine.startup import Engine
from support.engine import Generated, running_engine, step, submit_of, without_trials
from support.tiny_checkpoints import make_checkpoint

STREAMS = 16
HOW = Sampling(max_tokens=20, temperature=0, ignore_eos=True, logprobs=1)
PROMPTS = [[(7 * i + 5 * k) % 250 for i in range(5 + k)] for k in range(STREAMS)]
USED = MemoryUse(0, 0, "process")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    make_checkpoint("olmoe", folder / "model", seed=3)
    prepare(folder / "model", folder / "store", "float32")
    return folder / "store"


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    without_trials(monkeypatch)


def run(engine: Engine, changes: list[SetBudget], budget: LiveBudget | None = None) -> list[Generated]:
    """All streams to their end; a budget changes every few steps."""
    budget, results = budget or LiveBudget(engine), {i: Generated() for i in range(STREAMS)}
    for i, prompt in enumerate(PROMPTS):
        engine.core.submit(submit_of(i, prompt, HOW), 0.0)
    steps = 0
    while engine.core.has_work:
        step(engine, results)
        steps += 1
        if steps % 4 == 0 and changes:
            change = changes.pop(0)
            answer = budget.set(change)
            assert answer.error is None, answer.error
            assert answer.expert_limit_bytes == answer.expert_budget_bytes, "nothing is leased between steps"
        budget.tick(USED)
        engine.cache.ledger.check()
        engine.core.scheduler.check()
    assert not changes, "the streams ended before the budget had changed so often"
    return list(results.values())


def said(results: list[Generated]) -> list[object]:
    assert all(one.finished is not None and one.finished.reason == "length" for one in results)
    return [[output.logprobs for output in one.outputs] for one in results]


def test_expert_budgets_change_time_alone(store: Path) -> None:
    with running_engine(store, threads=1) as engine:
        expected = said(run(engine, []))
    with running_engine(store, threads=1) as engine:
        whole = engine.info.expert_bytes_total
        changes = [SetBudget(whole * share // 100) for share in (30, 100, 30, 100)]
        assert said(run(engine, changes)) == expected
        assert engine.cache.ledger.counters.evictions["budget_change"] > 0


def test_a_lower_memory_budget_takes_idle_kv_first_and_what_sequences_hold_never(store: Path) -> None:
    with running_engine(store, threads=1) as engine:
        expected = said(run(engine, []))
    with running_engine(store, threads=1, max_model_len=64) as engine:
        measured, capacity = engine.measured, engine.pool.capacity
        fixed = measured.base + measured.step + GROWTH_BYTES
        low = fixed + engine.info.expert_bytes_total // 2 + 40 * measured.kv_block
        high = fixed + engine.info.expert_bytes_total + capacity * measured.kv_block
        changes = [SetBudget(memory_budget_bytes=size) for size in (low, high, low)]
        assert said(run(engine, changes)) == expected
        budget = LiveBudget(engine)
        budget.set(SetBudget(memory_budget_bytes=low))
        assert engine.pool.capacity == 4, "the KV of one sequence; all else is for experts"
        assert budget.set(SetBudget(memory_budget_bytes=high)).memory_budget_bytes == high
        assert engine.pool.capacity == capacity


def test_kv_grows_past_what_it_began_with(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_engine(store, threads=1) as engine:
        expected = said(run(engine, []))
    monkeypatch.setattr(startup, "plan_memory", lambda *args: replace(plan_memory(*args), kv_blocks=4))
    with running_engine(store, threads=1, max_model_len=64) as engine:
        budget, measured = LiveBudget(engine), engine.measured
        assert said(run(engine, [], budget)) == expected and engine.pool.capacity == 4
        fixed = measured.base + measured.step + GROWTH_BYTES
        high = fixed + engine.info.expert_bytes_total + 60 * measured.kv_block
        assert said(run(engine, [SetBudget(memory_budget_bytes=high)], budget)) == expected
        assert engine.pool.capacity == 60
        with pytest.MonkeyPatch.context() as patch:
            dropped: list[int] = []
            patch.setattr(engine.storage, "drop", dropped.append)
            budget.set(SetBudget(memory_budget_bytes=high - 50 * measured.kv_block))
            assert sorted(dropped) == list(range(11, 61)), "what was given up returns its memory, once"
            budget.tick(USED)
            assert len(dropped) == 50


def test_a_box_short_of_memory_gets_expert_bytes_and_gives_them_back(store: Path, tmp_path: Path) -> None:
    psi, seconds = tmp_path / "psi", iter(range(1000))
    psi.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    with running_engine(store, threads=1) as engine:
        ledger = engine.cache.ledger
        whole = ledger.budget_bytes
        budget = LiveBudget(engine, PressureReader(PressureSource(psi), lambda: next(seconds)))
        run(engine, [], budget)
        assert ledger.budget_bytes == whole and ledger.resident_bytes > whole // 2
        psi.write_text("some avg10=50.00 avg60=0.00 avg300=0.00 total=500000\n")
        resident = ledger.resident_bytes
        budget.tick(USED)
        assert ledger.limit_bytes == whole - budget.control.lent_bytes <= 0.75 * resident
        assert ledger.resident_bytes <= ledger.limit_bytes
        for _ in range(100):
            budget.tick(USED)
        assert (ledger.budget_bytes, budget.control.lent_bytes, budget.control.shrinks) == (whole, 0, 1)


def test_a_budget_that_cannot_be_changes_nothing(store: Path) -> None:
    with running_engine(store, threads=1, max_model_len=64) as engine:
        budget, before = LiveBudget(engine), engine.cache.ledger.budget_bytes
        for change in (SetBudget(1), SetBudget(10**15), SetBudget(memory_budget_bytes=10**6)):
            answer = budget.set(change)
            assert answer.error is not None and answer.expert_budget_bytes == before
            assert answer.memory_budget_bytes is None
        assert "the smallest that works is" in str(answer.error)
