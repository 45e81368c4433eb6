"""What a step on a card consists of, seen by the profiler: one graph launch, no other kernel, nobody waits inside."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from expertd_engine.messages import Sampling
from support.device_engine import device_engine, make_store
from support.engine import submit_of

STEPS = 100
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")


@pytest.mark.parametrize("budget", ["100%", "50%"])
def test_a_decode_step_is_one_graph_and_never_waits_inside(tmp_path: Path, budget: str) -> None:
    store = make_store("qwen3_moe", tmp_path)
    with device_engine(store, "cuda:0", expert_budget=budget) as engine:
        engine.core.submit(submit_of(1, [5, 6, 7], Sampling(max_tokens=STEPS + 20, ignore_eos=True)), 0.0)
        for _ in range(10):
            engine.core.step(0.0)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            for _ in range(STEPS):
                engine.core.step(0.0)
        calls = Counter({one.key: one.count for one in seen.key_averages()})
    assert calls["cudaGraphLaunch"] == STEPS
    assert sum(calls[name] for name in LAUNCHES) == 0
    # The profiler itself synchronises once, when it ends.
    assert sum(calls[name] for name in WAITS) <= 1


def test_memory_stays_inside_the_budget_and_comes_back(tmp_path: Path) -> None:
    """As the card tells it: all that is in use there, less what was before."""
    store = make_store("qwen3_moe", tmp_path)
    before = torch.cuda.mem_get_info()[0]
    budget = 3 * 2**30
    with device_engine(store, "cuda:0", memory_budget=str(budget)) as engine:
        engine.core.submit(submit_of(1, list(range(40)), Sampling(max_tokens=20, ignore_eos=True)), 0.0)
        while engine.core.has_work:
            engine.core.step(0.0)
            assert before - torch.cuda.mem_get_info()[0] <= budget
        assert engine.meter.measure().used_bytes <= budget


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
