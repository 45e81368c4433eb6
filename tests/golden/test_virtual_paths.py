"""Virtual mode of a model of one index in the real engine: whole paths in the place of those that are not held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertd_engine.bench.cut_store import cut_store
from expertd_engine.bench.quality_paths import MOVING, PathQuality
from expertd_engine.bench.virtual_speed import virtual_speed
from expertd_engine.calibration import TextEngine
from expertd_engine.config import Size
from expertd_engine.errors import UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.virtual_paths import VirtualPaths
from expertd_engine.messages import Sampling
from expertd_engine.model.path_routing import PathRouting
from expertd_engine.plan_command import main as plan
from expertd_engine.planning.planner import Request, make_plan
from expertd_engine.prepare import prepare
from expertd_engine.profile_file import write_profile
from expertd_engine.profiling import profile
from expertd_engine.startup import Engine
from expertd_engine.step_costs import NOT_COUNTED, StepCosts
from golden.tolerances import PREGATED_LOGPROBS
from refactor.tiny import HEADS, INDEX, make_pregated
from support.engine import Ask, Generated, ask, make_config, running_engine, stats_of, without_trials

ANSWERS = Sampling(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0)
PROMPTS = [[(7 * i + 3) % 250 for i in range(20)], [(11 * i + 5) % 250 for i in range(33)]]
ONE_PATH = {"threads": 1, "max_model_len": 64, "expert_budget": "75%", "virtual_slots": 1}


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    without_trials(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`index`, a checkpoint, and `store`; of a model that may read a little more than other tests need."""
    folder = tmp_path_factory.mktemp("paths")
    make_pregated(folder / "index", INDEX)
    config = json.loads((folder / "index" / "config.json").read_text())
    (folder / "index" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    prepare(folder / "index", folder / "store", "float32")
    return folder


def run(engine: Engine, *asks: Ask, first_id: int = 1) -> list[Generated]:
    done = ask(engine, asks, ANSWERS, first_id=first_id)
    engine.cache.pump()
    engine.cache.ledger.check()
    return done


def paths_of(engine: Engine) -> PathRouting:
    assert isinstance(engine.runner.virtual, PathRouting)
    return engine.runner.virtual


def logprobs(answer: Generated) -> list[float]:
    return [entry.logprob for output in answer.outputs for entry in output.logprobs or []]


def still(engine: Engine) -> PathRouting:
    """One path is held, and stays."""
    routing = paths_of(engine)
    routing.sets.observe_paths({1: 1e9})
    routing.held.begin_step()
    routing.held.settle()
    assert routing.sets.whole() == {1}
    return routing


def test_tokens_take_the_likeliest_held_path_from_the_first_layer_to_the_last(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "index", dtype=torch.float32).eval()
    with running_engine(folder / "store", **ONE_PATH) as engine:
        still(engine)
        counters = engine.cache.ledger.counters
        before = sum(counters.misses) + sum(counters.late)
        answers = run(engine, *((prompt, "virtual", 1.0) for prompt in PROMPTS))
        assert sum(counters.misses) + sum(counters.late) == before, "nobody waits"
        counts = paths_of(engine).counts
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt + answer.token_ids])
        own = torch.ones(1, ids.shape[1], 1)
        with torch.inference_mode():
            logits = model.route(ids, None, torch.arange(ids.shape[1])[None], None)[0, :-1]
            scores = model(ids, routes=(own.long(), own)).logits[0].log_softmax(-1)
        expected = scores[len(prompt) - 1 : -1]
        assert expected.argmax(-1).tolist() == answer.token_ids
        theirs = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert float((torch.tensor(logprobs(answer)) - theirs).abs().max()) <= PREGATED_LOGPROBS.allowed
        met, shares = stats_of(answer), logits.softmax(-1)
        above = torch.where(shares > shares[:, 1:2], shares, 0).sum(dim=1)
        layers = len(model.model.layers)
        assert (met.virtual_tokens, met.choices) == (len(logits), len(logits) * layers)
        assert met.substituted == layers * int((above > 0).sum()) > 0
        assert met.substituted_mass == pytest.approx(float(above.sum()), rel=1e-3)
    told = [stats_of(answer) for answer in answers]
    assert sum(counts.substituted) == sum(one.substituted for one in told)
    assert sum(counts.mass) / layers == pytest.approx(sum(one.substituted_mass for one in told))
    assert counts.tokens == sum(one.virtual_tokens for one in told) and counts.fetched == 0


def test_layers_that_hold_no_whole_path_compute_as_ones_that_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for whole in (True, False):
        with running_engine(folder / "store", **ONE_PATH) as engine:
            still(engine)
            if not whole:
                monkeypatch.setattr(VirtualPaths, "whole", lambda self: frozenset())
                monkeypatch.setattr(VirtualPaths, "end_step", lambda self, tokens: [])
            answers = run(engine, *((prompt, "virtual", 1.0) for prompt in PROMPTS))
            assert sum(stats_of(answer).substituted for answer in answers) > 0
        seen.append([(answer.token_ids, logprobs(answer)) for answer in answers])
    assert seen[0] == seen[1]


def test_exact_tokens_never_notice_and_a_limit_is_kept(folder: Path) -> None:
    with running_engine(folder / "store", threads=1, max_model_len=64) as engine:
        expected = [answer.token_ids for answer in run(engine, *((prompt, "exact", 1.0) for prompt in PROMPTS))]
    met = {}
    with running_engine(folder / "store", **ONE_PATH) as engine:
        for number, limit in enumerate((1.0, 0.5, 1e-9)):
            answers = run(engine, *((prompt, "virtual", limit) for prompt in PROMPTS), first_id=10 * number + 1)
            told = [stats_of(answer) for answer in answers]
            assert all(one.substituted_mass <= limit * one.virtual_tokens for one in told)
            met[limit] = sum(one.substituted for one in told)
        assert [answer.token_ids for answer in answers] == expected, "all of its own paths were waited for"
        assert met[1e-9] == 0 < met[0.5] < met[1.0] and paths_of(engine).counts.fetched > 0
        mixed = run(
            engine, (PROMPTS[0], "virtual", 1.0), (PROMPTS[0], "exact", 1.0), (PROMPTS[1], "exact", 1.0), first_id=50
        )
        assert [answer.token_ids for answer in mixed[1:]] == expected
        assert stats_of(mixed[1]).choices == 0 < stats_of(mixed[0]).choices


def test_paths_move_to_where_tokens_go_in_the_smallest_budget(folder: Path) -> None:
    index = ExpertStore.open(folder / "store").index
    smallest = (len(index.layers) + 2) * index.record_bytes(0)
    with running_engine(folder / "store", **{**ONE_PATH, "expert_budget": str(smallest)}) as engine:
        routing = still(engine)
        routing.sets.observe_paths({2: 1e12})
        run(engine, (PROMPTS[0], "virtual", 1.0))
        routing.held.settle()
        assert routing.sets.whole() == {2} and routing.sets.swaps == [1] * 3
        engine.cache.set_budget(smallest - 1)
        (refused,) = run(engine, (PROMPTS[0], "virtual", 1.0), first_id=2)
        assert refused.finished is not None and refused.finished.refused
        assert f"the smallest that works is {smallest} bytes" in str(refused.finished.error)


def test_a_model_whose_layers_choose_apart_ahead_is_refused_by_name(tmp_path: Path) -> None:
    make_pregated(tmp_path / "heads", HEADS)
    prepare(tmp_path / "heads", tmp_path / "store", "float32")
    with running_engine(tmp_path / "store", max_model_len=64) as engine:
        (refused,) = run(engine, (PROMPTS[0], "virtual", 1.0))
        assert refused.finished is not None and refused.finished.refused
        assert "chooses 2 experts in each of 3 heads" in str(refused.finished.error)
    with pytest.raises(UsageError, match="no virtual mode: its router chooses in each of 3 heads"):
        cut_store(ExpertStore.open(tmp_path / "store"), 4, tmp_path / "cut")


def test_quality_is_told_for_every_method(folder: Path) -> None:
    config = make_config(model="", threads=1, max_model_len=64, max_sequences=1, prefix_cache=False)
    text = TextEngine(ExpertStore.open(folder / "store"), config)
    try:
        assert text.virtual is None
        assert text.paths is not None
        bench = PathQuality(text, PROMPTS, PROMPTS[:1], text.paths)
        points = bench.points(factors=[1.25])
        with pytest.raises(UsageError, match="method 'planned' is not known: choose from paths, counts"):
            bench.points(["planned"])
    finally:
        text.close()
    assert [point.method for point in points] == list(bench.methods)
    assert all(point.slots == 1 and 0 < point.substituted < 1 and point.divergence > 0 for point in points)
    assert all((point.swaps == 0) == (point.method not in MOVING) for point in points)
    substituted = {point.method: point.substituted for point in points}
    assert substituted["cache-prior"] < substituted["paths"], "what a token clearly prefers is fetched"


def test_plans_foretell_what_fewer_paths_cost(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("expertd_engine.profiling.served_bytes", lambda *args: 10**11)
    store = ExpertStore.open(folder / "store")
    config = make_config(model="", threads=1, max_model_len=192, max_sequences=4, prefix_cache=False)
    monkeypatch.setattr("expertd_engine.profiling.held_out", lambda tokenizer, count: PROMPTS[:count])
    costs = StepCosts(0.01, 0.0, 0.0, [[[1]] * 3] * (NOT_COUNTED + 1), NOT_COUNTED + 1)
    monkeypatch.setattr("expertd_engine.profiling.measure_steps", lambda *args: costs)
    measured = profile(store, config, tokens=12)
    curve = measured.model.paths
    assert curve is not None and measured.model.layers == [] and curve.paths == [1, 2, 3]
    assert curve.mass[0] > curve.mass[1] > curve.mass[2] == 0 == curve.divergence[2] < min(curve.divergence[:2])
    assert measured.box.virtual_s is not None and measured.box.virtual_s > 0
    budget = 9 * measured.expert_bytes // 10
    planned = make_plan(measured, Request(mode="virtual", expert_budget=Size(budget), share=0.9))
    assert planned.slots == [2] * 3 and planned.divergence == curve.divergence[1]
    with running_engine(store.path, threads=1, expert_budget=str(budget), virtual_share=0.9) as engine:
        held = paths_of(engine).held
        assert held.begin_step() and held.sets.slots == planned.slots
    write_profile(store, measured)
    try:
        assert plan([str(store.path), "--expert-budget", "75%", "--expert-mode", "virtual", "--explain"]) == 0
    finally:
        (store.path / "profile.json").unlink()
    told = capsys.readouterr().out
    assert "1 in each layer: so many of 3 whole paths" in told and "the last path saved" in told


def test_a_virtual_token_is_timed_beside_one_of_a_model_of_fewer_paths(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd_engine.bench.virtual_speed.held_out", lambda tokenizer, count: PROMPTS[:count])
    values = json.loads(virtual_speed(folder / "store", 1, pairs=2, tokens=4, threads=1).splitlines()[-1])
    runs = values["runs"]
    assert runs["virtual"]["stall_s"] == 0 < runs["virtual"]["substituted"] < 1
    assert runs["a model of 1 experts"]["substituted"] == 0 < values["ratio"]
    assert runs["a model of 1 experts"]["expert_bytes_per_token"] == runs["virtual"]["expert_bytes_per_token"]
