"""Virtual mode on a card: held experts alone, in one graph launch a step, and exact tokens that never notice."""

from __future__ import annotations

from typing import Any

import pytest

from expertd_engine.bench.make_model import make_model
from expertd_engine.bench.shapes import Cut
from expertd_engine.experts.store import ExpertStore
from expertd_engine.messages import Sampling
from support.cuda_calls import PROFILERS_WAITS, STEPS, CudaCalls, calls_of_steps
from support.device_engine import device_engine
from support.engine import Ask, Generated, ask, submit_of
from support.engine import stats_of as stats

MINE = [(7 * i + 3) % 250 for i in range(20)]
OTHER = [(11 * i + 5) % 250 for i in range(90)]
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


def run(engine: Any, *asks: Ask, first_id: int = 1) -> list[Generated]:
    done = ask(engine, asks, GREEDY, first_id=first_id)
    engine.cache.settle()
    engine.cache.ledger.check()
    return done


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    """4 layers of 128 experts, top-8, of 1.1 MiB in float32."""
    cut = Cut(layers=4, vocabulary=512, narrow=4)
    folder = tmp_path_factory.mktemp("virtual") / "store"
    return make_model("qwen3-30b-a3b", folder, "float32", cut=cut, order="rows", one_layer=True)


def test_virtual_tokens_never_wait_and_exact_ones_never_notice(store: ExpertStore) -> None:
    layers, top_k = len(store.index.layers), store.index.top_k
    with device_engine(store, "cuda:0", expert_budget="50%", virtual_slots=2 * top_k) as engine:
        exact: tuple[Ask, Ask] = (MINE, "exact", 1.0), (OTHER, "exact", 1.0)
        expected = [one.token_ids for one in run(engine, *exact)]
        link, counters = engine.cache.link, engine.cache.ledger.counters
        before = (link.read, link.landed, link.staged, *counters.misses, *counters.late)
        first, _ = run(engine, (MINE, "virtual", 1.0), (OTHER, "virtual", 1.0), first_id=10)
        assert (link.read, link.landed, link.staged, *counters.misses, *counters.late) == before
        met = stats(first)
        assert met.virtual_tokens == len(MINE) + GREEDY.max_tokens - 1
        assert met.choices == met.virtual_tokens * layers * top_k
        assert 0 < met.substituted < met.choices and 0 < met.substituted_mass < met.virtual_tokens
        assert met.stall_s == 0.0 and sum(engine.runner.virtual.held.sets.swaps) > 0
        mixed = run(engine, *exact, (MINE, "virtual", 1.0), (OTHER, "virtual", 0.3), first_id=20)
        assert [one.token_ids for one in mixed[:2]] == expected, "virtual requests ran before and beside"
        for number, limit in enumerate((0.4, 0.1, 1e-9)):
            (limited,) = run(engine, (MINE, "virtual", limit), first_id=30 + number)
            assert stats(limited).substituted_mass <= limit * stats(limited).virtual_tokens + 1e-4
        assert stats(limited).substituted == 0 < stats(limited).expert_misses
        assert limited.token_ids == expected[0], "all of its own experts were waited for"
        budget = engine.cache.ledger.budget_bytes
        for share in (0.3, 1.0):
            engine.cache.set_budget(int(share * budget))
            assert stats(run(engine, (MINE, "virtual", 1.0), first_id=100 + int(10 * share))[0]).expert_misses == 0
        assert [one.token_ids for one in run(engine, *exact, first_id=200)] == expected, "a budget came and went"


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
def test_a_virtual_step_is_one_graph_and_never_waits_inside(store: ExpertStore) -> None:
    with device_engine(store, "cuda:0", expert_budget="50%", virtual_slots=32) as engine:
        sampling = Sampling(max_tokens=STEPS + 20, ignore_eos=True)
        engine.core.submit(submit_of(1, [5, 6, 7], sampling, mode="virtual"), 0.0)
        calls = calls_of_steps(engine)
        assert engine.runner.virtual.counts.tokens > STEPS and sum(engine.runner.virtual.held.sets.swaps) > 0
    assert calls == CudaCalls(graphs=STEPS, kernels=0, waits=calls.waits) and calls.waits <= PROFILERS_WAITS
