"""What a step on a card consists of, seen by the profiler: one graph launch, no other kernel, nobody waits inside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertd_engine.bench.make_model import make_model
from expertd_engine.bench.shapes import Cut
from expertd_engine.experts.store import ExpertStore
from expertd_engine.live_budget import LiveBudget
from expertd_engine.messages import Sampling, SetBudget
from expertd_engine.planning.startup_plan import GROWTH_BYTES
from support.cuda_calls import PROFILERS_WAITS, STEPS, CudaCalls, calls_of_steps
from support.device_engine import device_engine, make_store
from support.engine import submit_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    """4 layers of 128 experts of 576 KiB, 288 MiB in all: chunks of slots are of megabytes."""
    folder = tmp_path_factory.mktemp("steps") / "store"
    cut = Cut(layers=4, vocabulary=512, narrow=4)
    return make_model("qwen3-30b-a3b", folder, "bf16", cut=cut, order="rows", one_layer=True)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize("budget", ["100%", "50%"])
def test_a_decode_step_is_one_graph_and_never_waits_inside(store: ExpertStore, budget: str) -> None:
    with device_engine(store, "cuda:0", expert_budget=budget) as engine:
        engine.core.submit(submit_of(1, [5, 6, 7], Sampling(max_tokens=STEPS + 20, ignore_eos=True)), 0.0)
        calls = calls_of_steps(engine)
    assert calls == CudaCalls(graphs=STEPS, kernels=0, waits=calls.waits) and calls.waits <= PROFILERS_WAITS


def test_a_lower_budget_gives_memory_back_as_the_card_tells_it(store: ExpertStore) -> None:
    with device_engine(store, "cuda:0", expert_budget="100%") as engine:
        budget = engine.cache.ledger.max_budget_bytes
        before = torch.cuda.mem_get_info()[0]
        engine.cache.set_budget(budget // 4)
        assert torch.cuda.mem_get_info()[0] - before >= budget // 2
        engine.core.submit(submit_of(1, list(range(40)), Sampling(max_tokens=20, ignore_eos=True)), 0.0)
        while engine.core.has_work:
            engine.core.step(0.0)
            assert torch.cuda.mem_get_info()[0] - before >= budget // 2
        engine.cache.settle()
        engine.cache.ledger.check()


def test_a_lower_memory_budget_gives_keys_and_values_back_as_the_card_tells_it(store: ExpertStore) -> None:
    options = {"expert_budget": "25%", "max_sequences": 16, "max_model_len": 1024}
    with device_engine(store, "cuda:0", **options) as engine:
        assert engine.storage.fallback is None
        measured, blocks, before = engine.measured, engine.pool.capacity, torch.cuda.mem_get_info()[0]
        fixed = measured.base + measured.step + GROWTH_BYTES
        low = fixed + engine.cache.ledger.budget_bytes + 64 * measured.kv_block
        high = fixed + measured.experts_total + blocks * measured.kv_block
        budget = LiveBudget(engine)
        assert budget.set(SetBudget(memory_budget_bytes=low)).error is None
        returned = (blocks - engine.pool.capacity) * measured.kv_block
        assert returned > 2**24 and torch.cuda.mem_get_info()[0] - before >= returned - 2**22
        assert budget.set(SetBudget(memory_budget_bytes=high)).error is None and engine.pool.capacity == blocks
        engine.core.submit(submit_of(1, list(range(40)), Sampling(max_tokens=20, ignore_eos=True)), 0.0)
        while engine.core.has_work:
            engine.core.step(0.0)


def test_a_failed_allocation_fails_one_step_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertd_engine.kernels.cuda.experts_prefill import PairGroups

    whole, fails = PairGroups.of, [True]

    def sometimes(index: torch.Tensor, num_experts: int) -> object:
        if fails.pop() if fails else False:
            raise torch.OutOfMemoryError("no room, as planted")
        return whole(index, num_experts)

    store = make_store("mixtral", tmp_path)
    with device_engine(store, "cuda:0") as engine:
        monkeypatch.setattr(PairGroups, "of", sometimes)
        engine.core.submit(submit_of(1, list(range(40)), Sampling(max_tokens=4, ignore_eos=True)), 0.0)
        told = [engine.core.step(0.0) for _ in range(12)]
        tokens = [token for steps in told for output in steps.outputs for token in output.token_ids]
        engine.cache.settle()
        engine.cache.ledger.check()
    assert len(tokens) == 4
