"""The demo on a card: the same bits at every budget, and in the invariant mode the same tokens in every batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from expertd_engine.experts.store import ExpertStore
from expertd_engine.messages import Sampling
from expertd_engine.model.cuda_model import DeviceModel, StepOutcome
from expertd_engine.sources import resolve
from support.demo import CACHE, PROMPTS, demo_store, encode
from support.device_engine import device_engine
from support.engine import generate

GREEDY = Sampling(max_tokens=48, temperature=0.0, ignore_eos=True)
SCORED = Sampling(max_tokens=48, temperature=0.0, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def store() -> ExpertStore:
    demo_store("bf16")  # skips where the demo cannot be had
    return ExpertStore.open(resolve("demo", CACHE, "bf16", target="gpu"))


@pytest.fixture
def logits_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Every logit that leaves the device."""
    seen: list[torch.Tensor] = []
    whole = DeviceModel.step

    def recording(*args: Any) -> StepOutcome:
        outcome = whole(*args)
        seen.extend(outcome.logits[place] for place in sorted(outcome.logits))
        return outcome

    monkeypatch.setattr(DeviceModel, "step", recording)
    yield seen


def test_logits_have_the_same_bits_at_every_budget(store: ExpertStore, logits_seen: list[torch.Tensor]) -> None:
    prompts = [encode(text) for text in PROMPTS[:4]]
    by_budget: dict[int, torch.Tensor] = {}
    with device_engine(store, "cuda:0", expert_budget="100%") as engine:
        ledger = engine.cache.ledger
        whole = ledger.max_budget_bytes
        for turn, budget in enumerate((whole, whole // 2, whole // 4, ledger.minimum_bytes)):
            engine.cache.set_budget(budget)
            logits_seen.clear()
            generate(engine, prompts, SCORED, first_id=1 + 4 * turn)
            by_budget[budget] = torch.stack(logits_seen)
            assert engine.cache.tiers().device_bytes <= budget
        ledger.check()
    first, *others = by_budget.values()
    assert len(others) == 3 and len(first) == 4 * SCORED.max_tokens
    assert all(torch.equal(first, other) for other in others)


def tokens_of(engine: Any, prompts: list[list[int]], batch: int) -> tuple[list[list[int]], float]:
    """Of all prompts, so many at a time; and the seconds that took."""
    began, done = time.perf_counter(), []
    for first in range(0, len(prompts), batch):
        ids = 1 + 1000 * batch + first
        done += [result.token_ids for result in generate(engine, prompts[first : first + batch], GREEDY, first_id=ids)]
    return done, time.perf_counter() - began


def test_invariant_tokens_are_the_same_in_every_batch(store: ExpertStore) -> None:
    """Prints what the mode costs, beside the default one."""
    prompts = [encode(text) for text in (PROMPTS * 2)[:32]]
    seconds: dict[str, list[float]] = {}
    batches = (32, 8, 2, 1)
    for numerics in ("per-batch", "invariant"):
        with device_engine(store, "cuda:0", max_sequences=32, max_step_tokens=128, numerics=numerics) as engine:
            assert engine.info.numerics == numerics
            runs = [tokens_of(engine, prompts, batch) for batch in batches]
        seconds[numerics] = [each for _, each in runs]
        if numerics == "invariant":
            assert all(tokens == runs[0][0] for tokens, _ in runs)
    ratios = [slow / fast for slow, fast in zip(seconds["invariant"], seconds["per-batch"], strict=True)]
    print({batch: f"{ratio:.3f}" for batch, ratio in zip(batches, ratios, strict=True)}, seconds)
