"""The demo end to end: a real model, part of it resident, against plain transformers on the dense original.

`make test` runs a small part; `make acceptance` runs everything and prints the figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from expertd_engine.messages import Sampling
from expertd_engine.model.runner import Runner
from golden.tolerances import DEMO_FLOAT32_LOGITS, DEMO_PERPLEXITY_RATIO
from support.demo import PROMPTS, block_checkpoint, demo_store, dense_model, encode
from support.engine import generate, running_engine

GREEDY = Sampling(max_tokens=64, temperature=0, ignore_eos=True)
SHORT = Sampling(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture
def logits_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Every step's logits, as the sampler gets them."""
    seen: list[torch.Tensor] = []
    original = Runner._logits

    def recording(*args: Any) -> torch.Tensor:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(Runner, "_logits", recording)
    yield seen


def in_batches(prompts: Sequence[list[int]], size: int) -> list[list[list[int]]]:
    """Batches of exactly `size`: the prompts again from the first where they run out."""
    padded = list(prompts) + [prompts[i % len(prompts)] for i in range(-len(prompts) % size)]
    return [padded[i : i + size] for i in range(0, len(padded), size)]


def tokens_of(store: Path, prompts: Sequence[list[int]], batch: int, how: Sampling, **options: Any) -> list[list[int]]:
    with running_engine(store, expert_policy="auto", **options) as engine:
        results = [r.token_ids for group in in_batches(prompts, batch) for r in generate(engine, group, how)]
        engine.cache.ledger.check()
        assert engine.pool.used_blocks == 0
    return results[: len(prompts)]


# ---------------------------------------------------------------- against plain transformers


def greedy_by_transformers(model: Any, prompt: list[int], how: Sampling) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the logits `[tokens, V]` that chose them, recomputed in one pass."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=how.max_tokens, min_new_tokens=how.max_tokens,
            do_sample=False, pad_token_id=0, eos_token_id=None, repetition_penalty=1.0,
        )  # fmt: skip
        logits = model(whole).logits[0, len(prompt) - 1 : -1]
    return whole[0, len(prompt) :].tolist(), logits


def check_against_dense(prompts: Sequence[str], how: Sampling, seen: list[torch.Tensor]) -> float:
    dense = dense_model(torch.float32)
    worst = 0.0
    with running_engine(demo_store("float32")) as engine:
        for text in prompts:
            seen.clear()
            prompt = encode(text)
            ours = generate(engine, [prompt], how)[0].token_ids
            theirs, logits = greedy_by_transformers(dense, prompt, how)
            assert ours == theirs, text
            worst = max(worst, float((torch.cat(seen) - logits).abs().max()))
    return worst


@pytest.mark.slow
def test_float32_is_the_dense_model(logits_seen: list[torch.Tensor]) -> None:
    assert check_against_dense(PROMPTS[:2], SHORT, logits_seen) <= DEMO_FLOAT32_LOGITS.allowed


@pytest.mark.acceptance
def test_float32_is_the_dense_model_on_20_prompts(logits_seen: list[torch.Tensor]) -> None:
    worst = check_against_dense(PROMPTS, GREEDY, logits_seen)
    print(f"\n20 prompts × 64 greedy tokens equal; largest logit difference {worst:.2e}")
    assert worst <= DEMO_FLOAT32_LOGITS.allowed


def perplexity_and_choices(logits: torch.Tensor, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    loss = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:])
    return float(loss.exp()), logits.argmax(-1)


@pytest.mark.acceptance
def test_bf16_perplexity(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(encode("\n".join(topics[name] for name in sorted(topics)))[: 4 * 512]).view(4, 512)
    dense = dense_model(torch.bfloat16)
    block = AutoModelForCausalLM.from_pretrained(
        block_checkpoint(tmp_path, "bf16"), dtype=torch.bfloat16, experts_implementation="eager"
    )
    how = Sampling(max_tokens=1, temperature=0, prompt_logprobs=1)
    losses: dict[str, list[float]] = {"dense": [], "eager blocks": [], "ours": []}
    flips = {"eager blocks": 0, "ours": 0}
    with running_engine(demo_store("bf16"), max_model_len=600) as engine, torch.inference_mode():
        for row in ids:
            reference = dense(row[None]).logits[0, :-1].float()
            eager = block(row[None]).logits[0, :-1].float()
            scored = generate(engine, [row.tolist()], how)[0].outputs[0].prompt_logprobs
            assert scored is not None
            losses["dense"] += (-reference.log_softmax(-1).gather(1, row[1:, None])).flatten().tolist()
            losses["eager blocks"] += (-eager.log_softmax(-1).gather(1, row[1:, None])).flatten().tolist()
            losses["ours"] += [-entry.logprob for entry in scored[1:] if entry is not None]
            choices = torch.tensor([entry.top[0].token_id for entry in scored[1:] if entry is not None])
            flips["eager blocks"] += int((eager.argmax(-1) != reference.argmax(-1)).sum())
            flips["ours"] += int((choices != reference.argmax(-1)).sum())
    perplexity = {name: float(torch.tensor(values).mean().exp()) for name, values in losses.items()}
    count = len(losses["dense"])
    ratio = perplexity["ours"] / perplexity["dense"]
    print(f"\nbf16 perplexity over {count} tokens: {perplexity}, ours / dense {ratio:.5f}")
    print("argmax flips against dense bf16: " + ", ".join(f"{k} {v / count:.2%}" for k, v in flips.items()))
    assert abs(ratio - 1) <= DEMO_PERPLEXITY_RATIO.allowed


# ---------------------------------------------------------------- budgets change time, never tokens


@pytest.mark.slow
def test_tokens_do_not_depend_on_batch_chunk_or_budget() -> None:
    prompts = [encode(text) for text in PROMPTS[16:20]]
    store = demo_store("bf16")
    alone = tokens_of(store, prompts, 1, SHORT)
    assert tokens_of(store, prompts, 4, SHORT, max_step_tokens=16, expert_budget="25%") == alone


MATRIX = [(b, c, e) for b in (32, 8, 2, 1) for e in ("100%", "50%", "minimum") for c in (16, 512)]


@pytest.mark.acceptance
def test_tokens_over_the_full_matrix() -> None:
    prompts = [encode(text) for text in PROMPTS]
    store = demo_store("bf16")
    alone = tokens_of(store, prompts, 1, GREEDY)
    for batch, chunk, budget in MATRIX:
        size = "663552" if budget == "minimum" else budget
        tokens = tokens_of(store, prompts, batch, GREEDY, max_step_tokens=chunk, expert_budget=size)
        print(f"batch {batch}, steps of {chunk} tokens, expert budget {budget}: equal {tokens == alone}", flush=True)
        assert tokens == alone


@pytest.mark.acceptance
def test_one_sequence_of_steps_has_the_same_bits_at_every_budget(logits_seen: list[torch.Tensor]) -> None:
    prompts = [encode(text) for text in PROMPTS[:3]]
    reference: torch.Tensor | None = None
    for budget in ("663552", "25%", "50%", "100%"):
        for policy in ("lru", "next-use"):
            for prefetch in (True, False):
                logits_seen.clear()
                options = {"expert_budget": budget, "expert_policy": policy, "prefetch": prefetch}
                with running_engine(demo_store("bf16"), max_step_tokens=16, **options) as engine:
                    generate(engine, prompts, SHORT)
                logits = torch.cat(logits_seen)
                reference = logits if reference is None else reference
                equal = torch.equal(logits, reference)
                print(f"{options}: {len(logits)} rows bit-equal {equal}", flush=True)
                assert equal


@pytest.mark.slow
def test_a_quarter_of_the_experts_hits_at_least_a_fifth() -> None:
    """Next-use against LRU, whose hits on a cycle are none at all; reads agree with the kernel's own count."""
    shares = {}
    for policy in ("next-use", "lru"):
        with running_engine(demo_store("bf16"), expert_budget="25%", expert_policy=policy, prefetch=False) as engine:
            before = read_bytes()
            generate(engine, [encode(PROMPTS[0])], Sampling(max_tokens=12, temperature=0, ignore_eos=True))
            counters = engine.cache.ledger.counters
            shares[policy] = sum(counters.hits) / counters.lookups()
            assert engine.cache.ledger.peak_bytes <= engine.cache.ledger.budget_bytes
            if engine.info.direct_io:
                assert read_bytes() - before == pytest.approx(counters.demand_bytes, rel=0.05)
    print(f"\nhits at 25 %: {shares}")
    assert shares["next-use"] >= 0.2
    assert shares["lru"] == 0


def read_bytes() -> int:
    """What this process made the disk read, by the kernel's count."""
    lines = dict(line.split(": ") for line in Path(f"/proc/{os.getpid()}/io").read_text().splitlines())
    return int(lines["read_bytes"])
