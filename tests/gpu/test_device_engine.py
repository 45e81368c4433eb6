"""Engines on a card, against transformers' modules on the processor: tiny families, graphs and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expertd_engine.experts.device_slab import plan_chunks
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import ALIGNMENT
from expertd_engine.messages import Sampling
from expertd_engine.planning.misses import CUT_NEURONS, Split
from golden.tolerances import DEVICE_EXPERTS_BF16, DEVICE_FLOAT32_LOGITS
from support.device_engine import SEED, device_engine, make_store
from support.engine import Generated, generate
from support.tiny_checkpoints import make_model
from support.tiny_families import TINY_FAMILIES

FAMILIES = sorted(TINY_FAMILIES)
PROMPTS = [[(7919 * i + 13 * j) % 256 for i in range(5 + 20 * j)] for j in range(3)]
GREEDY = Sampling(max_tokens=6, temperature=0.0, logprobs=5, ignore_eos=True)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExpertStore | Path]:
    return {"": tmp_path_factory.mktemp("stores")}


def store_of(stores: dict[str, Any], family: str) -> ExpertStore:
    """The family's store; made on first use."""
    if family not in stores:
        stores[family] = make_store(family, stores[""] / family)
    store: ExpertStore = stores[family]
    return store


def run(store: ExpertStore, prompts: list[list[int]], **options: Any) -> list[Generated]:
    with device_engine(store, "cuda:0", **options) as engine:
        done = generate(engine, prompts, GREEDY)
        engine.cache.settle()
        engine.cache.ledger.check()
        return done


@torch.inference_mode()
def largest_error(family: str, results: list[Generated]) -> float:
    """Of the tokens' log-probabilities, against the whole model's."""
    model = make_model(family, SEED)
    errors = []
    for prompt, result in zip(PROMPTS, results, strict=True):
        logits = model(torch.tensor([[*prompt, *result.token_ids]]), use_cache=False).logits[0].float()
        expected = logits.log_softmax(-1)[len(prompt) - 1 :]
        for place, (token, output) in enumerate(zip(result.token_ids, result.outputs, strict=True)):
            assert output.logprobs is not None
            errors.append(abs(output.logprobs[0].logprob - float(expected[place, token])))
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_transformers(family: str, stores: dict[str, Any]) -> None:
    results = run(store_of(stores, family), PROMPTS)
    assert largest_error(family, results) <= DEVICE_FLOAT32_LOGITS.allowed


@pytest.fixture
def fine_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of so small a model would fit one granule of a card's memory, and any budget below it would be too small."""
    monkeypatch.setattr(
        "expertd_engine.device_experts.plan_chunks",
        lambda slot_bytes, experts: plan_chunks(slot_bytes, experts, ALIGNMENT),
    )


def half_of_them(missing: int, *_: object) -> Split:
    return Split(missing // 2, missing % 2 * CUT_NEURONS)


@pytest.mark.usefixtures("fine_chunks")
@pytest.mark.parametrize("experts_format", ["float32", "bf16", "int8", "int4"])
def test_the_processor_computes_what_steps_miss(
    experts_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of one to four rows, half of the experts resident: as over the link, but for rounding. An odd one is
    divided, which no such small experts are by their speeds."""
    monkeypatch.setattr("support.tiny_families._EXPERT_FFN", 96)
    monkeypatch.setattr("expertd_engine.planning.balance.left_to_processor", half_of_them)
    store = make_store("qwen3_moe", tmp_path, experts_format)
    results = {}
    for misses in ("link", "cpu", "both"):
        with device_engine(store, "cuda:0", expert_budget="50%", device_misses=misses) as engine:
            results[misses] = generate(engine, PROMPTS, GREEDY)
            engine.cache.settle()
            engine.cache.ledger.check()
            tiers = engine.cache.tiers()
            assert (tiers.misses, tiers.computed > 0) == (misses, misses != "link")
            assert (tiers.link_bytes["shared"] > 0) == (tiers.shared is not None) == (misses == "both")
            assert misses != "cpu" or tiers.link_bytes["read"] == tiers.link_bytes["landed"] == 0
    allowed = DEVICE_FLOAT32_LOGITS if experts_format == "float32" else DEVICE_EXPERTS_BF16
    pairs = [pair for by in ("cpu", "both") for pair in zip(results["link"], results[by], strict=True)]
    for one, other in pairs:
        for token, others, output, theirs in zip(
            one.token_ids, other.token_ids, one.outputs, other.outputs, strict=True
        ):
            if token != others:
                break  # nearly equal ones may change places, and then all that follows is another text
            assert output.logprobs is not None and theirs.logprobs is not None
            assert abs(output.logprobs[0].logprob - theirs.logprobs[0].logprob) <= 4 * allowed.allowed


def test_tokens_do_not_depend_on_batch_mates(stores: dict[str, Any]) -> None:
    store = store_of(stores, "qwen3_moe")
    together = [result.token_ids for result in run(store, PROMPTS)]
    with device_engine(store, "cuda:0") as engine:
        alone = [generate(engine, [prompt], GREEDY, first_id=1 + i)[0].token_ids for i, prompt in enumerate(PROMPTS)]
    assert alone == together


@pytest.mark.usefixtures("fine_chunks")
def test_half_of_the_experts_in_the_host_and_the_rest_on_disk(stores: dict[str, Any]) -> None:
    """A step then waits once a layer for its routes, and says so."""
    store = store_of(stores, "qwen3_moe")
    with device_engine(store, "cuda:0", expert_budget="50%", host_budget="50%") as engine:
        assert engine.info.step_path == "layers" and not engine.cache.host.complete
        results = generate(engine, PROMPTS, GREEDY)
        assert engine.cache.layer_waits > 0
        engine.cache.settle()
        engine.cache.ledger.check()
    assert largest_error("qwen3_moe", results) <= DEVICE_FLOAT32_LOGITS.allowed
