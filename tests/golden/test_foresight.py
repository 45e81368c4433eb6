"""Traces, predictors and policies on a real engine: they change time, never a bit, and the lab tells what it does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from expertd_engine.console import silent
from expertd_engine.errors import ConfigError, StoreError, UsageError
from expertd_engine.experts.governor import Governor
from expertd_engine.experts.lookahead import LayerScan
from expertd_engine.experts.store import ExpertStore
from expertd_engine.lab import replay_command, trace_command, train_command
from expertd_engine.lab.compare import compare as compare_policies
from expertd_engine.lab.compare import recommend
from expertd_engine.lab.events import Events, events_of
from expertd_engine.lab.predictor_file import PREDICTOR_NAME, read_predictor, write_predictor
from expertd_engine.lab.rankings import AdaptiveRanking, LFURanking, LRURanking, Ranking, ScoredRanking
from expertd_engine.lab.recall import recalls
from expertd_engine.lab.recommendation import NAME as ADVICE_NAME
from expertd_engine.lab.recommendation import read_recommendation, write_recommendation
from expertd_engine.lab.replay import replay
from expertd_engine.lab.scores import scores_of
from expertd_engine.lab.trace import Trace, read_traces
from expertd_engine.lab.trace_command import record
from expertd_engine.lab.training import Plan, train
from expertd_engine.messages import Sampling
from expertd_engine.model.gates import Gate, find_gates
from expertd_engine.model.loader import load_model
from expertd_engine.model.router_kinds import adapt_router
from expertd_engine.prepare import prepare
from expertd_engine.startup import Engine
from support.engine import Generated, Logits, generate, without_trials
from support.engine import running_engine as running
from support.tiny_mixtral import EXPERTS, make_mixtral

LAYERS, LEADS = 6, 3
GREEDY = Sampling(max_tokens=80, temperature=0.8, seed=5, ignore_eos=True, logprobs=3)
MODEL_LEN = 600


def prompt(number: int, length: int = 24) -> list[int]:
    return [(37 * number + 11 * i * i) % 250 for i in range(length)]


@contextmanager
def running_engine(store: Path, **options: Any) -> Iterator[Engine]:
    with running(store, **{"threads": 1, "max_model_len": 128, "expert_budget": "30%", **options}) as engine:
        yield engine


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foresight")
    make_mixtral(folder / "model", num_hidden_layers=LAYERS, max_position_embeddings=MODEL_LEN)
    return prepare(folder / "model", folder / "store", "float32").path


@pytest.fixture(scope="module")
def gates(store: Path) -> list[Gate]:
    opened = ExpertStore.open(store)
    return find_gates(load_model(opened).model, [layer.module for layer in opened.index.layers])


@pytest.fixture(scope="module")
def trace(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Of text, with hidden states."""
    folder = tmp_path_factory.mktemp("trace") / "t"
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, 250, 512).tolist() for _ in range(2)]
    assert record(ExpertStore.open(store), windows, folder, hidden=True, threads=1, progress=silent) == 1024
    return read_traces([folder], hidden=True)


@pytest.fixture(scope="module", autouse=True)
def trained(store: Path, trace: Trace, gates: list[Gate]) -> None:
    predictor = train(trace, gates, Plan(leads=LEADS, rank=16, epochs=20))
    write_predictor(store, predictor, trace.header.store_id, {})


def answer(engine: Engine, tokens: int = GREEDY.max_tokens) -> list[Generated]:
    return generate(engine, [prompt(1), prompt(2)], msgspec.structs.replace(GREEDY, max_tokens=tokens))


def governor_of(engine: Engine) -> Governor:
    assert isinstance(engine.cache.lookahead, LayerScan) and isinstance(engine.cache.lookahead.inner, Governor)
    return engine.cache.lookahead.inner


def test_no_predictor_and_no_policy_changes_a_bit(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any logit, nor which tokens are sampled from them."""
    without_trials(monkeypatch)
    logits = Logits(monkeypatch)
    with running_engine(store, predictor="none", prefetch=False, expert_policy="lru") as engine:
        tokens = [one.token_ids for one in answer(engine, 32)]
        expected, logits.steps = logits.steps, []
    ways = [
        *itertools.product(("next-gate", "learned"), ("lru", "lfu", "next-use"), (True, False)),
        *itertools.product(("learned",), ("predicted",), (True, False)),
    ]
    for predictor, policy, prefetch in ways:
        with running_engine(store, predictor=predictor, expert_policy=policy, prefetch=prefetch) as engine:
            found = [one.token_ids for one in answer(engine, 32)]
            engine.cache.ledger.check()
            assert governor_of(engine).tracks, "nothing was foreseen"
        assert found == tokens and len(logits.steps) == len(expected) >= 32
        assert all(map(torch.equal, logits.steps, expected)), (predictor, policy, prefetch)
        logits.steps.clear()


@pytest.mark.parametrize("policy", ["lru", "lfu", "next-use", "predicted"])
def test_replay_of_an_engines_own_trace_hits_as_the_engine_did(store: Path, tmp_path: Path, policy: str) -> None:
    """To 0.1 point, prompts and several rows a step included; states are those of text recorded the same way."""
    options: dict[str, Any] = {"predictor": "learned"} if policy == "predicted" else {"predictor": "none"}
    with running_engine(
        store, expert_policy=policy, prefetch=False, trace_dir=tmp_path, trace_share=1.0, **options
    ) as engine:
        assert engine.recorder is not None
        engine.recorder.sees_hidden = True
        answer(engine)
        counters, slots = engine.cache.ledger.counters, engine.cache.ledger.num_slots
        slots = engine.cache.ledger.budget_bytes // engine.info.expert_record_bytes
        engine.recorder.close()
    trace = read_traces([tmp_path], hidden=True)
    events = events_of(trace)
    found = replay(events, slots, ranking_of(policy, store, trace, events, slots))
    assert found.lookups == counters.lookups()
    assert abs(found.hit_rate - sum(counters.hits) / counters.lookups()) < 0.001


def ranking_of(policy: str, store: Path, trace: Trace, events: Events, slots: int) -> Ranking:
    """The lab's of a policy that engines serve with."""
    made: dict[str, Callable[[], Ranking]] = {
        "lru": lambda: LRURanking(events),
        "lfu": lambda: LFURanking(events),
        "next-use": lambda: AdaptiveRanking(events, slots),
        "predicted": lambda: ScoredRanking(
            events, scores_of(trace, events, read_predictor(store, trace.header.store_id))
        ),
    }
    return made[policy]()


def test_a_text_is_routed_in_large_steps_as_it_is_token_by_token(store: Path, trace: Trace, tmp_path: Path) -> None:
    windows = [np.random.default_rng(0).integers(0, 250, 512).tolist()[:40]]
    with running_engine(store, predictor="none", trace_dir=tmp_path, trace_share=1.0, max_step_tokens=1) as engine:
        generate(engine, windows, Sampling(max_tokens=1, temperature=0.0, ignore_eos=True))
        assert engine.recorder is not None
        engine.recorder.close()
    assert np.array_equal(read_traces([tmp_path]).routes, trace.routes[:40])


def test_gates_are_the_routers_of_the_layers_ahead(store: Path, gates: list[Gate], trace: Trace) -> None:
    """On a layer's own states a gate chooses as its router does; seen from itself it is itself."""
    assert trace.hidden is not None
    for layer, gate in enumerate(gates):
        matrix, bias = gate.seen_from(gate)
        logits = trace.hidden[:64, layer].astype(np.float32) @ matrix.T + bias
        chosen = np.sort(np.argsort(-logits, axis=1)[:, :2], axis=1)
        assert (chosen == trace.routes[:64, layer]).mean() > 0.98, "states are kept in float16, so near ties may flip"
    model = load_model(ExpertStore.open(store)).model
    later, earlier = gates[2], gates[1]
    x = torch.randn(4, earlier.scale.shape[0], generator=torch.Generator().manual_seed(1))
    rms = x / x.square().mean(-1, keepdim=True).sqrt()
    router = adapt_router(model, ExpertStore.open(store).index.layers[2].module)
    assert router is not None
    real = router.logits(rms * torch.from_numpy(later.scale))
    matrix, bias = later.seen_from(earlier)
    ours = (rms * torch.from_numpy(earlier.scale)).numpy() @ matrix.T + bias
    assert np.allclose(ours, real.numpy(), atol=1e-4)


def test_the_learned_foresees_more_than_the_gates_it_began_with(trace: Trace, store: Path, gates: list[Gate]) -> None:
    """On text it has seen: a tiny random model's states say little that is true elsewhere."""
    found = {one.name: one for one in recalls(trace, gates, read_predictor(store, trace.header.store_id), LEADS)}
    chance = 2 / EXPERTS
    for name in ("next gate", "learned"):
        assert (found[name].at_k.mean(axis=0) > chance).all() and (found[name].at_more >= found[name].at_k).all()
    assert (found["learned"].at_k.mean(axis=0) > found["next gate"].at_k.mean(axis=0)).all()


def test_what_a_replay_recommends_is_served(store: Path, trace: Trace) -> None:
    slots = LAYERS * EXPERTS // 3
    advice = recommend(
        compare_policies(trace, [slots], read_predictor(store, trace.header.store_id)), trace.header.store_id
    )
    try:
        write_recommendation(store, msgspec.structs.replace(advice, policy="lfu", predictor="next-gate"))
        with running_engine(store) as engine:
            assert engine.info.policy == "lfu" and engine.info.lookahead == "predicted"
        with running_engine(store, expert_policy="lru", predictor="none") as engine:
            assert engine.info.policy == "lru" and engine.info.lookahead == "none"
        write_recommendation(store, msgspec.structs.replace(advice, policy="predicted", predictor="learned"))
        with running_engine(store, predictor="none") as engine:
            assert engine.info.policy == "next-use"
            assert any("recommends the policy predicted" in one for one in engine.info.fallbacks)
        (store / ADVICE_NAME).write_text("{}")
        with pytest.raises(StoreError, match="recommendation"), running_engine(store):
            pass
    finally:
        (store / ADVICE_NAME).unlink()


@pytest.mark.parametrize("change", [{"top_k": EXPERTS}, {"model_type": "pregated_llama"}])
def test_nothing_is_recommended_where_routes_are_known_ahead(store: Path, change: dict[str, Any]) -> None:
    index = ExpertStore.open(store).index
    replay_command.refuse_what_is_foreseen(index)
    with pytest.raises(UsageError, match="known ahead"):
        replay_command.refuse_what_is_foreseen(msgspec.structs.replace(index, **change))


def test_what_cannot_be_is_refused(store: Path, trace: Trace, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="predicted"),
        running_engine(store, expert_policy="predicted", predictor="none"),
    ):
        pass
    with pytest.raises(UsageError, match="too few"):
        train(trace.rows(slice(0, 100)), None)
    with pytest.raises(UsageError, match="leads"):
        train(trace, None, Plan(leads=LAYERS))
    with pytest.raises(StoreError, match="another store"):
        read_predictor(store, "another")
    with pytest.raises(StoreError, match="train-predictor"):
        read_predictor(tmp_path, "any")
    assert (store / PREDICTOR_NAME).is_file()


def test_a_restarted_engine_hits_as_the_one_before(store: Path) -> None:
    """The first 100 tokens: at least 90 % of the steady hit rate."""
    long = msgspec.structs.replace(GREEDY, max_tokens=100)
    options = {"predictor": "none", "prefetch": False, "warm_restart": True, "expert_budget": "40%"}
    with running_engine(store, **options) as engine:
        generate(engine, [prompt(1)], long)
        before = engine.cache.ledger.counters.lookups(), sum(engine.cache.ledger.counters.hits)
        generate(engine, [prompt(1)], long)
        after = engine.cache.ledger.counters.lookups(), sum(engine.cache.ledger.counters.hits)
        steady = (after[1] - before[1]) / (after[0] - before[0])
        held = {e for e in ExpertStore.open(store).experts() if engine.cache.ledger.state(e) == "resident"}
        assert engine.warm is not None
        engine.warm.keep()
    with running_engine(store, **options) as engine:
        assert engine.warm is not None
        engine.warm.recall()
        while engine.warm.is_recalling:
            engine.cache.wait()
        engine.cache.ledger.check()
        assert held == {e for e in ExpertStore.open(store).experts() if engine.cache.ledger.state(e) == "resident"}
        generate(engine, [prompt(1)], long)
        counters = engine.cache.ledger.counters
        assert sum(counters.hits) / counters.lookups() >= 0.9 * steady
    with running_engine(store, **{**options, "expert_budget": "10%"}) as engine:
        assert engine.warm is not None
        engine.warm.recall()
        while engine.warm.is_recalling:
            engine.cache.wait()
        assert engine.cache.ledger.resident_bytes <= engine.cache.ledger.budget_bytes, "no more than there is room for"
        engine.cache.ledger.check()


def test_while_predictions_do_not_pay_layers_run_on_and_bits_stay(store: Path) -> None:
    """Off, on and off again in the middle of an answer, as trials do."""
    with running_engine(store, predictor="none", prefetch=False) as engine:
        expected = [one.token_ids for one in answer(engine)]
    with running_engine(store, predictor="learned") as engine:
        payoff, turns, listens = governor_of(engine).payoff, itertools.count(), itertools.count()

        def begin_step(rows: int | None, *, ahead: bool = False) -> bool:
            payoff.is_on = payoff._kept = next(turns) // 7 % 2 == 0
            payoff._left = 999 * (next(listens) // 21 % 2)  # the predictor listens all along, or not while it is off
            return payoff.is_on

        payoff.begin_step = begin_step  # type: ignore[method-assign]  # a clock of the test's own
        found = answer(engine)
        engine.cache.ledger.check()
    assert [one.token_ids for one in found] == expected


def test_the_commands_record_learn_and_recommend(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder, told = tmp_path / "text", tmp_path / "trace", tmp_path / "told.json"
    text.write_text(" ".join(str(n * n) for n in range(900)))
    assert (
        trace_command.main(["record", str(store), str(folder), "--text", str(text), "--tokens", "1536", "--hidden"])
        == 0
    )
    trained = [str(store), str(folder), "--leads", "2", "--rank", "8", "--epochs", "2", "--held", "0.3"]
    assert train_command.main(trained) == 0
    assert "learned @2" in capsys.readouterr().out
    asked = [str(folder), "--store", str(store), "--budgets", "2k,50%", "--recommend", "--json", str(told)]
    try:
        assert replay_command.main(asked) == 0
        values = json.loads(told.read_text())
        assert values["tokens"] == 1536 and set(values["budgets"]) == {"2k", "50%"}
        assert {"lru", "clairvoyant", "predicted", "least stale"} <= set(values["budgets"]["2k"])
        advice = read_recommendation(store, ExpertStore.open(store).index.store_id)
        assert advice is not None and advice.lookups == values["lookups"]
    finally:
        (store / ADVICE_NAME).unlink(missing_ok=True)
    other = prepare(store.parent / "model", tmp_path / "other", "bf16").path
    assert replay_command.main([str(folder), "--store", str(other), "--recommend"]) != 0
    assert "not of" in capsys.readouterr().err and not (other / ADVICE_NAME).exists()
    assert replay_command.main([str(folder), "--budgets", "1"]) != 0
    assert replay_command.main([str(folder), "--recommend"]) != 0
    assert trace_command.main(["record", str(store), str(folder)]) != 0, "there is one already"
    assert "already" in capsys.readouterr().err
