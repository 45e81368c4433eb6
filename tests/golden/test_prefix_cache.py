"""The prefix cache on a real engine: with it and without it, tokens and log-probabilities are the same, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertd_engine.messages import Sampling, TokenLogprob
from expertd_engine.prepare import prepare
from expertd_engine.startup import Engine
from support.engine import Generated, generate, running_engine
from support.tiny_checkpoints import make_checkpoint

SYSTEM = [(7 * i) % 256 for i in range(70)]
"""Four full blocks of 16 and a bit, longer than the sliding window."""
PROMPTS = [[*SYSTEM, *range(i, i + 5 + 9 * i)] for i in range(4)]
SAMPLING = Sampling(max_tokens=20, temperature=0.9, seed=5, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(request.param, folder / "checkpoint", seed=1)
    prepare(folder / "checkpoint", folder / "store", "float32")
    return folder / "store"


def logprobs(results: list[Generated]) -> list[list[TokenLogprob]]:
    return [[entry for output in one.outputs for entry in output.logprobs or ()] for one in results]


def in_turn_then_together(engine: Engine) -> list[Generated]:
    results = [one for i, prompt in enumerate(PROMPTS) for one in generate(engine, [prompt], SAMPLING, first_id=10 + i)]
    return results + generate(engine, PROMPTS, SAMPLING, first_id=20)


def cached(results: list[Generated]) -> list[int]:
    return [one.finished.stats.cached_tokens for one in results if one.finished is not None]


def test_tokens_and_logprobs_are_those_of_an_engine_that_computes_everything(store: Path) -> None:
    with running_engine(store, threads=1, max_step_tokens=40, prefix_cache=False) as engine:
        assert engine.info.numerics == "invariant"
        plain = in_turn_then_together(engine)
        assert cached(plain) == [0] * 8
    with running_engine(store, threads=1, max_step_tokens=40) as engine:
        reusing = in_turn_then_together(engine)
        assert cached(reusing) == [0, 64, 64, 64, *(len(p) // 16 * 16 for p in PROMPTS)]
    assert logprobs(reusing) == logprobs(plain)


def test_preempted_sequences_go_on_from_their_own_blocks(store: Path) -> None:
    """Room for one sequence and a bit: the later ones give way, and find again what they had computed."""
    sampling = Sampling(max_tokens=70, temperature=0.9, seed=5, ignore_eos=True, logprobs=3)
    with running_engine(store, threads=1, max_model_len=192) as engine:
        plain = generate(engine, PROMPTS, sampling)
        assert engine.core.scheduler.num_preemptions == 0
        kv_budget = str(14 * engine.storage.block_bytes)
    with running_engine(store, threads=1, max_model_len=192, kv_budget=kv_budget) as engine:
        reusing = generate(engine, PROMPTS, sampling)
        scheduler = engine.core.scheduler
        assert scheduler.num_preemptions > 0
        assert scheduler.prefixes is not None and scheduler.prefixes.num_hit > sum(cached(reusing))
        scheduler.check()
    assert logprobs(reusing) == logprobs(plain)
