"""Profile, plan and quality on a real engine with a tiny model: what is measured is what the planner reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from expertd_engine import step_costs
from expertd_engine.bench import planned
from expertd_engine.bench.foretold import MemoryRun
from expertd_engine.bench.quality import quality
from expertd_engine.bench.text_decoder import Decoder
from expertd_engine.bench.virtual_speed import virtual_speed
from expertd_engine.calibration import TextEngine
from expertd_engine.config import Config, Size
from expertd_engine.errors import BudgetError, UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.model.virtual_build import FORESEEN
from expertd_engine.model.virtual_routing import VirtualRouting
from expertd_engine.plan_command import main as plan
from expertd_engine.planning.planner import Request, make_plan
from expertd_engine.planning.profile import Profile
from expertd_engine.prepare import prepare
from expertd_engine.profile_file import read_profile, write_profile
from expertd_engine.profiling import learn_tokens, profile
from support.engine import running_engine, without_trials
from support.tiny_checkpoints import make_checkpoint

ALL = Request()
SERVED = 10**11
"""Bytes: more than this process has, whatever ran in it before."""

pytestmark = pytest.mark.usefixtures("quick_start")


@pytest.fixture(scope="module")
def quick_start() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_trials(patch)
        patch.setattr("expertd_engine.profiling.served_bytes", lambda *args: SERVED)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    folder = tmp_path_factory.mktemp("olmoe")
    make_checkpoint("olmoe", folder / "model", seed=3)
    return prepare(folder / "model", folder / "store", "float32")


@pytest.fixture(scope="module")
def profiled(store: ExpertStore, quick_start: None) -> Profile:
    config = Config(model=str(store.path), threads=1, max_model_len=192, max_sequences=4, prefix_cache=False)
    measured = profile(store, config, tokens=40, routings=["uniform"], learned=512)
    write_profile(store, measured)
    return measured


def test_what_is_learned_is_followed_at_once(store: ExpertStore) -> None:
    """The step that a profile times is one that swaps, as it does where it serves."""
    config = Config(
        model=str(store.path), threads=1, max_model_len=192, max_sequences=4, prefix_cache=False,
        expert_budget=Size(share=0.9), virtual_slots=6,
    )  # fmt: skip
    text = TextEngine(store, config)
    try:
        learn_tokens(text, store, 512)
        routing = text.virtual
        assert routing is not None and routing.tally.norms is not None
        for token in range(30):
            routing.begin_step([1.0], [token])
            routing.end_step(1)
            routing.held.settle()
        assert sum(routing.held.sets.swaps) > 0
    finally:
        text.close()


def test_who_serves_a_profiled_store_follows_its_tokens(store: ExpertStore, profiled: Profile) -> None:
    with running_engine(store.path, threads=1, expert_budget="75%", virtual_slots=6) as engine:
        routing = engine.runner.virtual
        assert isinstance(routing, VirtualRouting) and routing.runs and routing.tokens is not None
        assert routing.begin_step([1.0], [5])
        routing.held.settle()
        before = sum(routing.held.sets.swaps)
        for token in range(6, 30):
            routing.begin_step([1.0], [token])
            routing.end_step(1)
            routing.held.settle()
        assert before < sum(routing.held.sets.swaps) <= before + 24 * FORESEEN
        assert all(len(routing.held.sets.held(layer)) == 6 for layer in range(3))
        routing.held.close()


def test_a_profile_holds_what_was_measured(store: ExpertStore, profiled: Profile) -> None:
    assert read_profile(store) == profiled
    assert profiled.num_experts == [12] * 3 and profiled.top_k == 4
    assert profiled.memory.base == SERVED, "the server's processes count, too"
    assert len(profiled.box.reads_s) == 12 and min(profiled.box.reads_s) > 0
    assert profiled.box.step_s > 0 and profiled.box.leave_s >= 0 and profiled.box.overlap >= 0
    assert profiled.box.leave_s or profiled.box.overlap, "missing experts cost nothing"
    assert profiled.box.virtual_s is not None and profiled.box.virtual_s > 0
    curve, uniform = profiled.model.misses
    assert (curve.routing, uniform.routing) == ("model", "uniform")
    assert curve.hit_rates[0] < curve.hit_rates[-1] == 1
    assert len(profiled.model.layers) == 3
    for layer in profiled.model.layers:
        assert layer.slots[0] == 4 and layer.slots[-1] == 12
        assert layer.mass[-1] == 0 < layer.mass[0] < 1 and layer.sensitivity > 0


def test_steps_are_timed_in_no_more_memory_than_serving_would_plan(
    store: ExpertStore, quick_start: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[int] = []
    set_budget = Decoder.set_budget

    def noted(decoder: Decoder, nbytes: int) -> None:
        budgets.append(nbytes)
        set_budget(decoder, nbytes)

    monkeypatch.setattr(Decoder, "set_budget", noted)
    monkeypatch.setattr(Decoder, "refill", None)
    monkeypatch.setattr(step_costs, "STREAMS", 1)
    total = store.index.expert_bytes_total()
    config = Config(
        model=str(store.path), threads=1, max_model_len=192, max_sequences=4, expert_budget=Size(40 * total // 100)
    )
    costs = step_costs.measure_steps(store, config, [range(20)], [0.001] * 12, 2)
    assert set(budgets) == {35 * total // 100, 20 * total // 100}, "half of them do not fit"
    assert costs.step_s > 0 and len(costs.routes) == costs.stream == step_costs.NOT_COUNTED + 2


def test_a_profile_of_another_version_is_told_of_and_not_used(store: ExpertStore, profiled: Profile) -> None:
    old = msgspec.structs.replace(profiled, version=1)
    write_profile(store, old)
    try:
        with running_engine(store.path, threads=1) as engine:
            assert [one for one in engine.info.fallbacks if "profile again" in one]
    finally:
        write_profile(store, profiled)


def test_a_plan_is_printed_explained_and_refused(
    store: ExpertStore, profiled: Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan([str(store.path), "--expert-budget", "50%", "--json"]) == 0
    exact = json.loads(capsys.readouterr().out)
    assert exact["expert_budget_bytes"] == profiled.expert_bytes // 2 and 0 < exact["hit_rate"] < 1
    assert plan([str(store.path), "--expert-budget", "60%", "--expert-mode", "virtual", "--explain"]) == 0
    told = capsys.readouterr().out
    assert "nats a token from exact mode" in told and "the last slot saved" in told
    assert plan([str(store.path), "--memory-budget", "1MiB"]) == 4
    assert "the smallest that works is" in capsys.readouterr().err


def test_a_served_model_takes_the_split_of_its_profile(store: ExpertStore, profiled: Profile) -> None:
    with running_engine(store.path, threads=1, expert_budget="60%") as engine:
        assert engine.runner.virtual is not None
        held = engine.runner.virtual.held
        assert held.begin_step()
        room = int(0.75 * engine.info.expert_budget_bytes)
        assert sum(held.sets.slots) * profiled.record_bytes[0] <= room
        assert sum(held.sets.slots) >= room // profiled.record_bytes[0] - 2


def test_quality_is_told_for_every_method_and_all_experts_lose_nothing(store: ExpertStore, profiled: Profile) -> None:
    told = quality(
        store.path, 32, methods=("importance", "random", "cache-prior", "planned"), factors=(1.25,), threads=1
    )
    points = {point["method"]: point for point in json.loads(told.splitlines()[-1])["points"]}
    assert set(points) == {"importance", "random", "cache-prior", "planned"}
    assert all(0 < point["substituted"] < 1 and point["divergence"] > 0 for point in points.values())
    assert points["importance"]["swaps"] > 0 == points["random"]["swaps"]
    assert points["importance"]["mass"] < points["random"]["mass"]


def test_a_virtual_token_is_timed_beside_one_of_a_smaller_model(store: ExpertStore) -> None:
    told = virtual_speed(store.path, 6, pairs=2, tokens=4, threads=1)
    values = json.loads(told.splitlines()[-1])
    assert values["ratio"] > 0 and values["slots"] == 6
    runs = values["runs"]
    assert all(run["expert_bytes_per_token"] > 0 for run in runs.values())
    assert runs["virtual"]["stall_s"] == 0 < runs["virtual"]["substituted"] < 1
    assert runs["a model of 6 experts"]["substituted"] == 0
    with pytest.raises(UsageError, match="give 4 to 12"):
        virtual_speed(store.path, 3)


def test_plans_stand_beside_what_is_measured(
    store: ExpertStore, profiled: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "memory_runs", lambda *args: [MemoryRun("all", make_plan(profiled, ALL), 1)])
    values = planner_values(store, ["100%", "50%"])
    assert [run["run"].split(", ")[1:] for run in values["speed"]] == [
        [routing, budget] for routing in ("model", "uniform") for budget in ("100%", "50%")
    ]
    assert all(run["tok_s"] > 0 and run["foretold_tok_s"] > 0 for run in values["speed"])
    rounds = [one for run in values["speed"] for one in run["rounds"]]
    assert len(rounds) == 8 and all(min(one.values()) > 0 for one in rounds)
    assert values["memory"][0]["used_bytes"] == 1


def test_without_room_for_every_expert_once_more_there_is_no_pace(
    store: ExpertStore, profiled: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crowded(store: ExpertStore, config: Config, *others: Any) -> Decoder:
        if config.expert_budget is not None:
            raise BudgetError("available memory", 1, 2, "every expert")
        return Decoder(store, config, *others)

    monkeypatch.setattr(planned, "Decoder", crowded)
    values = planner_values(store, ["50%"], memory=False)
    assert all(run["tok_s"] > 0 and run["pace"] is run["error_at_pace"] is None for run in values["speed"])


def planner_values(store: ExpertStore, budgets: list[str], *, memory: bool = True) -> dict[str, Any]:
    told = planned.planner([store.path], ["model", "uniform"], budgets, rounds=2, tokens=10, memory=memory)
    values: dict[str, Any] = json.loads(told.splitlines()[-1])
    return values
