"""Virtual mode on the device path, interpreted on the processor: rows go to held experts alone, and exact rows never
notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from expertd_engine import device_virtual
from expertd_engine.experts.swaps import SwapLimits
from expertd_engine.messages import ExpertMode, Sampling
from expertd_engine.model import virtual_build
from expertd_engine.prepare import prepare
from golden.tolerances import DEVICE_FLOAT32_LOGITS
from support.device_engine import SEED, device_engine, make_store
from support.engine import Generated, ask, running_engine, without_trials
from support.engine import stats_of as stats
from support.tiny_checkpoints import make_model

FAMILY = "mixtral"
PROMPT = [11, 200]
GREEDY = Sampling(max_tokens=1, temperature=0.0, logprobs=20, ignore_eos=True)
STILL = SwapLimits(per_step=0, ahead=0)


def run(engine: Any, mode: ExpertMode, limit: float, number: int) -> Generated:
    """One sequence of this mode and limit, to its end."""
    return ask(engine, [(PROMPT, mode, limit)], GREEDY, first_id=number)[0]


def logprobs(generated: Generated) -> Any:
    return [output.logprobs for output in generated.outputs]


@torch.inference_mode()
def error(result: Generated) -> float:
    """Of the first token's log-probabilities, against transformers' modules."""
    expected = make_model(FAMILY, SEED)(torch.tensor([PROMPT]), use_cache=False).logits[0, -1].log_softmax(-1)
    [[told]] = logprobs(result)
    return max(abs(float(best.logprob - expected[best.token_id])) for best in told.top)


def test_virtual_rows_read_no_link_and_exact_ones_never_notice(tmp_path: Path) -> None:
    store = make_store(FAMILY, tmp_path)
    top_k, layers = store.index.top_k, len(store.index.layers)
    options = {"max_sequences": 2, "max_step_tokens": 4, "max_model_len": 16}
    with device_engine(store, "cpu", expert_budget="75%", virtual_slots=top_k, **options) as engine:
        virtual, link = engine.runner.virtual, engine.cache.link
        met = stats(run(engine, "virtual", 1.0, 1))
        assert (met.expert_misses, met.expert_late, met.stall_s) == (0, 0, 0.0)
        assert link.read == link.landed == link.staged == 0 < met.expert_hits
        assert (met.virtual_tokens, met.choices) == (len(PROMPT), len(PROMPT) * layers * top_k)
        assert 0 < met.substituted < met.choices and 0 < met.substituted_mass < met.virtual_tokens
        assert sum(virtual.counts.substituted) == met.substituted and virtual.counts.tokens == len(PROMPT)
        exact = run(engine, "exact", 1.0, 2)
        assert error(exact) <= DEVICE_FLOAT32_LOGITS.allowed, "a virtual request ran first, with the same prompt"
        limited = run(engine, "virtual", 1e-9, 3)
        assert logprobs(limited) == logprobs(exact), "all of its own experts were waited for"
        assert stats(limited).substituted == 0 < stats(limited).expert_misses
        engine.cache.settle()
        engine.cache.ledger.check()
        assert virtual.held.sets.slots == [top_k] * layers
        assert [sum(row) for row in engine.cache.table.held.tolist()] == [top_k] * layers
        expect_held_to_follow_a_budget(engine)


def expect_held_to_follow_a_budget(engine: Any) -> None:
    """What is held gives way to a lower budget, and is held anew in it; below what virtual mode needs it is refused."""
    held, room, ledger = engine.runner.virtual.held, engine.runner.virtual.held.room, engine.cache.ledger
    engine.cache.set_budget(room.minimum_bytes)
    assert held.refusal() is None and held.begin_step()
    assert len(ledger.kept) == sum(held.sets.slots) == len(room.experts) * room.top_k
    engine.cache.set_budget(ledger.minimum_bytes)
    assert not held.sets.is_open and not ledger.kept
    assert "expert budget for virtual mode" in (held.refusal() or "")
    engine.cache.settle()
    ledger.check()


def test_what_is_substituted_is_what_the_processor_substitutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (virtual_build, device_virtual):
        monkeypatch.setattr(module, "SwapLimits", lambda **_: STILL)
    store = make_store(FAMILY, tmp_path)
    prepare(tmp_path / "checkpoint", tmp_path / "cpu", "float32")
    without_trials(monkeypatch)
    options = {"max_sequences": 1, "max_step_tokens": 4, "max_model_len": 16, "virtual_slots": store.index.top_k}
    with device_engine(store, "cpu", expert_budget="75%", **options) as engine:
        met, held = stats(run(engine, "virtual", 1.0, 1)), engine.runner.virtual.held.sets
    with running_engine(tmp_path / "cpu", expert_budget="75%", threads=1, **options) as engine:
        assert engine.runner.virtual is not None
        for layer, priors in enumerate(engine.runner.virtual.held.sets.priors):
            for expert in held.held(layer):
                cast("list[float]", priors)[expert] += 1e6  # the device's own sets first
        theirs = stats(run(engine, "virtual", 1.0, 1))
    assert (met.substituted, met.choices) == (theirs.substituted, theirs.choices)
    assert met.substituted_mass == pytest.approx(theirs.substituted_mass, rel=1e-4)
