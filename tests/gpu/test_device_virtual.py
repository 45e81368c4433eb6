"""Virtual mode on a card: held experts alone, in one graph launch a step, and exact tokens that never notice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
from torch.profiler import ProfilerActivity, profile

from expertd_engine.bench.make_model import make_model
from expertd_engine.bench.shapes import Cut
from expertd_engine.experts.store import ExpertStore
from expertd_engine.messages import ExpertMode, Sampling, SequenceStats
from support.device_engine import device_engine
from support.engine import Generated, collect, submit_of

MINE = [(7 * i + 3) % 250 for i in range(20)]
OTHER = [(11 * i + 5) % 250 for i in range(90)]
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
Ask = tuple[list[int], ExpertMode, float]


def run(engine: Any, *asks: Ask, first_id: int = 1, sampling: Sampling = GREEDY) -> list[Generated]:
    """Sequences of these prompts, modes and limits, together, to their end."""
    results = {first_id + i: Generated() for i in range(len(asks))}
    for sequence_id, (prompt, mode, limit) in zip(results, asks, strict=True):
        submit = submit_of(sequence_id, prompt, sampling)
        engine.core.submit(msgspec.structs.replace(submit, mode=mode, max_substituted_mass=limit), 0.0)
    collect(engine, results)
    engine.cache.settle()
    engine.cache.ledger.check()
    return list(results.values())


def stats(generated: Generated) -> SequenceStats:
    assert generated.finished is not None and generated.finished.reason == "length", generated.finished
    return generated.finished.stats


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
    steps = 100
    with device_engine(store, "cuda:0", expert_budget="50%", virtual_slots=32) as engine:
        submit = submit_of(1, [5, 6, 7], Sampling(max_tokens=steps + 20, ignore_eos=True))
        engine.core.submit(msgspec.structs.replace(submit, mode="virtual"), 0.0)
        for _ in range(10):
            engine.core.step(0.0)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            for _ in range(steps):
                engine.core.step(0.0)
        calls = Counter({one.key: one.count for one in seen.key_averages()})
        assert engine.runner.virtual.counts.tokens > steps and sum(engine.runner.virtual.held.sets.swaps) > 0
    assert calls["cudaGraphLaunch"] == steps
    assert sum(calls[name] for name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")) == 0
    assert sum(calls[name] for name in ("cudaStreamSynchronize", "cudaDeviceSynchronize")) <= 1  # the profiler's own
