"""Virtual mode end to end: who is routed where, what it reports, and that exact tokens never notice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd_engine.calibration import with_slots
from expertd_engine.experts.events import ExpertId, Load, Priority
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.swaps import SwapLimits
from expertd_engine.messages import Sampling
from expertd_engine.model.virtual_routing import VirtualRouting
from expertd_engine.prepare import prepare
from expertd_engine.startup import Engine
from support.engine import Ask, Generated, ask, generate, running_engine, step, submit_of, without_trials
from support.engine import stats_of as stats
from support.kernels import needs_kernels
from support.tiny_checkpoints import make_checkpoint
from support.tiny_families import FAMILIES

GREEDY = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
MINE = [(7 * i + 3) % 250 for i in range(20)]
OTHER = [(11 * i + 5) % 250 for i in range(33)]


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    without_trials(monkeypatch)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of each family, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("families")

    class Stores(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            make_checkpoint(family, folder / family, seed=5)
            prepare(folder / family, folder / f"{family}-store", "float32")
            self[family] = folder / f"{family}-store"
            return self[family]

    return Stores()


def run(engine: Engine, *asks: Ask, first_id: int = 1) -> list[Generated]:
    done = ask(engine, asks, GREEDY, first_id=first_id)
    engine.cache.pump()
    engine.cache.ledger.check()
    engine.core.scheduler.check()
    return done


def virtual_of(engine: Engine) -> VirtualRouting:
    assert isinstance(engine.runner.virtual, VirtualRouting)
    return engine.runner.virtual


def top_k_of(store: Path) -> int:
    return ExpertStore.open(store).index.top_k


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_virtual_tokens_never_wait_and_exact_ones_never_notice(stores: dict[str, Path], family: str) -> None:
    store, options = stores[family], {"threads": 1, "expert_budget": "75%"}
    with running_engine(store, **options) as engine:
        expected = [stats(g) and g.token_ids for g in run(engine, (MINE, "exact", 1.0), (OTHER, "exact", 1.0))]
    with running_engine(store, virtual_slots=top_k_of(store), **options) as engine:
        counters = engine.cache.ledger.counters
        first, _ = run(engine, (MINE, "virtual", 1.0), (OTHER, "virtual", 1.0))
        assert sum(counters.misses) == sum(counters.late) == 0 < sum(counters.hits)
        met = stats(first)
        layers, top_k = len(engine.cache.ledger.experts_per_layer), top_k_of(store)
        assert met.virtual_tokens == len(MINE) + GREEDY.max_tokens - 1
        assert met.choices == met.virtual_tokens * layers * top_k
        assert 0 < met.substituted < met.choices and 0 < met.substituted_mass < met.virtual_tokens
        after = run(engine, (MINE, "exact", 1.0), (OTHER, "exact", 1.0), first_id=10)
        assert [g.token_ids for g in after] == expected, "a virtual request ran first, with the same prompt"
        mixed = run(
            engine, (MINE, "virtual", 1.0), (MINE, "exact", 1.0), (OTHER, "virtual", 0.3), (OTHER, "exact", 1.0),
            first_id=20,
        )  # fmt: skip
        assert [mixed[1].token_ids, mixed[3].token_ids] == expected
        assert stats(mixed[1]).choices == 0, "exact tokens have no substitutions to report"


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "gpt_oss", "phimoe"])
def test_a_limit_of_substituted_mass_is_kept(stores: dict[str, Path], family: str) -> None:
    store = stores[family]
    with running_engine(store, threads=1) as engine:
        exact = run(engine, (MINE, "exact", 1.0))[0].token_ids
    met = {}
    with running_engine(store, threads=1, expert_budget="75%", virtual_slots=top_k_of(store)) as engine:
        for number, limit in enumerate((1.0, 0.4, 0.1, 1e-9)):
            (generated,) = run(engine, (MINE, "virtual", limit), first_id=10 * number + 1)
            met[limit] = stats(generated)
            assert met[limit].substituted_mass <= limit * met[limit].virtual_tokens + 1e-6
    misses = [met[limit].expert_misses for limit in met]
    assert misses[0] == 0 < sum(misses), "without a limit nothing is waited for, with one its own experts are"
    assert generated.token_ids == exact, "all of its own experts were waited for"
    assert met[1e-9].substituted == 0 < met[0.4].substituted < met[1.0].substituted


class Tap:
    """Keeps the logits of all steps."""

    def __init__(self, engine: Engine) -> None:
        self.logits: list[Tensor] = []
        self._model = engine.runner.model
        engine.runner.model = self

    def forward(self, *step: Any) -> Tensor:
        self.logits.append(self._model.forward(*step))
        return self.logits[-1]

    def embeddings(self, token_ids: Sequence[int]) -> Tensor:
        return self._model.embeddings(token_ids)


STILL = SwapLimits(per_step=0, ahead=0)


@needs_kernels
@pytest.mark.parametrize("family", ["qwen2_moe", "glm4_moe", "gpt_oss"])
@pytest.mark.parametrize("limits", [(1.0,), (1.0, 1.0, 0.3)])
def test_native_runs_route_as_layers_do_one_by_one(
    stores: dict[str, Path], family: str, limits: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits have the same bits, and what is learned and reported is the same."""
    store = stores[family]
    slots = [top_k_of(store) + 1] * len(ExpertStore.open(store).index.layers)
    met, logits, scores, told, mass = [], [], [], [], []
    with running_engine(store, threads=2, expert_budget="75%", prefix_cache=False) as engine:
        model, tap = virtual_of(engine), Tap(engine)
        for number, natively in enumerate((False, True)):
            routing = engine.runner.virtual = with_slots(model, slots, STILL)
            routing.held.begin_step()
            routing.held.settle()
            routing.routes_natively = natively
            if natively and min(limits) == 1:
                monkeypatch.setattr(VirtualRouting, "route", None)
            asks: list[Ask] = [(MINE[: 9 + i], "virtual", limit) for i, limit in enumerate(limits)]
            met.append([stats(one) for one in run(engine, *asks, first_id=10 * number + 1)])
            logits.append(torch.cat(tap.logits))
            tap.logits.clear()
            sets = routing.held.sets
            scores.append([sets.score(layer, e) for layer in range(len(slots)) for e in range(len(sets.priors[layer]))])
            counts = routing.counts
            told.append([list(counts.activations), list(counts.substituted)])
            mass.append(list(counts.mass))
            routing.held.close()
    assert torch.equal(*logits)
    assert told[0] == told[1] and mass[0] == pytest.approx(mass[1], rel=1e-5)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    for layers, run_on in zip(*met, strict=True):
        assert (layers.choices, layers.substituted) == (run_on.choices, run_on.substituted)
        assert run_on.substituted_mass == pytest.approx(layers.substituted_mass, rel=1e-5)
    assert sum(counts.substituted) == sum(one.substituted for one in met[1]) > 0
    assert (counts.fetched > 0) == (min(limits) < 1)


@needs_kernels
def test_who_arrives_while_layers_run_on_serves_those_still_to_come(stores: dict[str, Path]) -> None:
    with running_engine(stores["olmoe"], threads=1, prefix_cache=False) as engine:
        run(engine, (MINE, "exact", 1.0))
        ledger, model = engine.cache.ledger, virtual_of(engine)
        slots = [top_k_of(stores["olmoe"])] * len(ledger.experts_per_layer)
        routing = engine.runner.virtual = with_slots(model, slots, STILL)
        (alone,) = run(engine, (MINE, "virtual", 1.0), first_id=2)
        table = routing.held.table
        for layer, count in enumerate(ledger.experts_per_layer):
            for expert in range(count):
                table.expect(ExpertId(layer, expert))
                table.loaded(Load(0, ExpertId(layer, expert), ledger.resident_slots(layer)[expert], Priority.DEMAND))
        (joined,) = run(engine, (MINE, "virtual", 1.0), first_id=3)
        assert stats(alone).substituted > 0 == stats(joined).substituted
        routing.held.close()


@pytest.mark.parametrize("swaps", ["amortised", "foreseen"])
def test_the_sets_move_while_they_are_used_and_go_when_they_are_not(
    stores: dict[str, Path], swaps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd_engine.experts.held.IDLE_STEPS", 5)
    options = {"expert_budget": "75%", "virtual_slots": 5, "virtual_swaps": swaps}
    with running_engine(stores["olmoe"], threads=1, **options) as engine:
        held = virtual_of(engine).held
        run(engine, (OTHER, "virtual", 1.0), (MINE, "virtual", 1.0))
        held.settle()
        assert held.sets.slots == [5] * 3 and sum(held.sets.swaps) > 0
        assert virtual_of(engine).runs == (swaps == "amortised")
        run(engine, (MINE, "exact", 1.0), first_id=5)
        assert not held.sets.is_open and not engine.cache._leases
        run(engine, (MINE, "virtual", 1.0), first_id=6)
        assert held.sets.is_ready


def test_a_budget_too_small_for_virtual_mode_refuses_it_with_the_smallest_that_works(stores: dict[str, Path]) -> None:
    store = stores["olmoe"]
    index = ExpertStore.open(store).index
    record, layers = index.record_bytes(0), len(index.layers)
    smallest = (index.top_k * layers + 2) * record
    with running_engine(store, threads=1, expert_budget=str(smallest - record)) as engine:
        (refused,) = run(engine, (MINE, "virtual", 1.0))
        assert refused.finished is not None and refused.finished.refused
        assert f"the smallest that works is {smallest} bytes" in str(refused.finished.error)
        stats(run(engine, (MINE, "exact", 1.0), first_id=2)[0])
    with running_engine(store, threads=1, expert_budget=str(smallest)) as engine:
        (served,) = run(engine, (MINE, "virtual", 1.0))
        assert stats(served).expert_misses == 0
        assert virtual_of(engine).held.sets.slots == [index.top_k] * layers


def test_where_all_experts_fit_none_is_substituted(stores: dict[str, Path]) -> None:
    with running_engine(stores["mixtral"], threads=1) as engine:
        expected = run(engine, (MINE, "exact", 1.0))[0].token_ids
        held = virtual_of(engine).held
        held.begin_step()
        held.settle()
        (generated,) = run(engine, (MINE, "virtual", 1.0), first_id=2)
        assert stats(generated).substituted == 0 and generated.token_ids == expected


def test_held_experts_follow_a_budget_that_changes_while_they_serve(stores: dict[str, Path]) -> None:
    store = stores["qwen3_moe"]
    index = ExpertStore.open(store).index
    whole, record = index.expert_bytes_total(), index.record_bytes(0)
    budgets: list[Any] = [whole // 2, (index.top_k * len(index.layers) + 2) * record, 2 * record, whole * 3 // 4]
    with running_engine(store, threads=1) as engine:
        results = {i: Generated() for i in range(3)}
        for number, mode in enumerate(("virtual", "exact", "virtual")):
            sampling = Sampling(max_tokens=24, temperature=0, ignore_eos=True)
            engine.core.submit(submit_of(number, MINE, sampling, mode=mode), 0.0)
        steps = 0
        while engine.core.has_work:
            step(engine, results)
            steps += 1
            if steps % 6 == 0 and budgets:
                engine.cache.set_budget(budgets[0])
                ledger = engine.cache.ledger
                assert ledger.limit_bytes == ledger.budget_bytes == budgets.pop(0), "nothing held stands in its way"
        assert not budgets and all(stats(result) for result in results.values())
        engine.cache.pump()
        engine.cache.ledger.check()
    with running_engine(store, threads=1) as engine:
        assert generate(engine, [MINE], sampling)[0].token_ids == results[1].token_ids
