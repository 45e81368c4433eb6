"""Engines on a card, against transformers' modules on the processor: tiny families, graphs and prompts, small budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expertd_engine.experts.store import ExpertStore
from expertd_engine.messages import Sampling
from expertd_engine.prepare import prepare
from golden.tolerances import DEVICE_FLOAT32_LOGITS
from support.engine import Generated, generate, make_config
from support.tiny_families import TINY_FAMILIES, make_checkpoint, make_model

UNMATCHED = {"deepseek_v2", "deepseek_v3"}
FAMILIES = sorted(TINY_FAMILIES - UNMATCHED)
PROMPTS = [[(7919 * i + 13 * j) % 256 for i in range(5 + 20 * j)] for j in range(3)]
GREEDY = Sampling(max_tokens=6, temperature=0.0, logprobs=5, ignore_eos=True)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"": tmp_path_factory.mktemp("stores")}


def store_of(stores: dict[str, Path], family: str) -> ExpertStore:
    """The family's store in the order that a card reads; made on first use."""
    if family not in stores:
        folder = stores[""] / family
        make_checkpoint(family, folder / "checkpoint", 4)
        prepare(folder / "checkpoint", folder / "store", "float32", order="rows")
        stores[family] = folder / "store"
    return ExpertStore.open(stores[family])


def run(store: ExpertStore, prompts: list[list[int]], **options: Any) -> list[Generated]:
    import os

    from expertd_engine.device_startup import start_on_device

    config = make_config(**{"max_sequences": 4, "max_step_tokens": 48, "threads": 2, **options})
    engine = start_on_device(
        store, config, os.getpid(), lambda stage, fraction: None, lambda r: r, torch.device("cuda", 0)
    )
    try:
        done = generate(engine, prompts, GREEDY)
        engine.cache.settle()
        engine.cache.ledger.check()
        return done
    finally:
        engine.cache.close()


@torch.inference_mode()
def largest_error(family: str, results: list[Generated]) -> float:
    """Of the tokens' log-probabilities, against the whole model's."""
    model = make_model(family, 4)
    errors = []
    for prompt, result in zip(PROMPTS, results, strict=True):
        logits = model(torch.tensor([[*prompt, *result.token_ids]]), use_cache=False).logits[0].float()
        expected = logits.log_softmax(-1)[len(prompt) - 1 :]
        for place, (token, output) in enumerate(zip(result.token_ids, result.outputs, strict=True)):
            assert output.logprobs is not None
            errors.append(abs(output.logprobs[0].logprob - float(expected[place, token])))
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_transformers(family: str, stores: dict[str, Path]) -> None:
    results = run(store_of(stores, family), PROMPTS)
    assert largest_error(family, results) <= DEVICE_FLOAT32_LOGITS.allowed


def test_tokens_do_not_depend_on_batch_mates(stores: dict[str, Path]) -> None:
    store = store_of(stores, "qwen3_moe")
    together = [result.token_ids for result in run(store, PROMPTS)]
    assert [run(store, [prompt])[0].token_ids for prompt in PROMPTS] == together
