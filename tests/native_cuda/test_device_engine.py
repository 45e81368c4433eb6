"""A whole engine of the device path, interpreted on the processor: prompts staged, tokens through the table's entries.

With few slots and with one for each expert: the same bits, and those of the whole model but for rounding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("triton")

from expertd_engine.bench.channel import make_channel
from expertd_engine.bench.device_session import DeviceSession
from expertd_engine.bench.foresight import Cell, report
from expertd_engine.bench.generated import GeneratedRoutes
from expertd_engine.bench.protocol import EngineSpec, Turns, TurnsRequest
from expertd_engine.bench.routing import make_routing, shape_of
from expertd_engine.bench.turns import take_turns, turns_of
from expertd_engine.errors import ConfigError, EngineError, ResourceError
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_plans import nothing_known
from expertd_engine.experts.lookahead import EveryExpert, Exactness, NoLookahead
from expertd_engine.live_budget import LiveBudget
from expertd_engine.messages import Sampling, SetBudget
from expertd_engine.model.cuda_model import Running, StepTokens
from expertd_engine.model.cuda_runner import nothing_follows
from expertd_engine.planning.misses import Split
from expertd_engine.planning.startup_plan import GROWTH_BYTES
from golden.tolerances import DEVICE_FLOAT32_LOGITS
from support.device_engine import SEED, device_engine, make_store
from support.engine import Generated, answers, generate, submit_of
from support.tiny_checkpoints import make_model

FAMILY = "mixtral"
PROMPT = [11, 7, 200, 33, 5]
SAMPLING = Sampling(max_tokens=3, temperature=0.0, logprobs=20, ignore_eos=True)


def test_an_engine_gives_the_models_numbers_at_every_budget_and_with_foresight(tmp_path: Path) -> None:
    store = make_store(FAMILY, tmp_path)
    [experts] = {layer.num_experts for layer in store.index.layers}
    everyone = EveryExpert(len(store.index.layers), experts, 4)  # names what is used, and much that is not
    results: list[Generated] = []
    for budget, policy, lookahead in (("40%", "lru", everyone), ("40%", "next-use", None), ("100%", "lfu", None)):
        options = {"max_sequences": 2, "max_step_tokens": 8, "max_model_len": 32, "expert_budget": budget}
        with device_engine(store, "cpu", lookahead, expert_policy=policy, **options) as engine:
            expect_kv_to_give_way(engine)
            results += generate(engine, [PROMPT], SAMPLING)
            engine.cache.settle()
            engine.cache.ledger.check()
            assert engine.cache.ledger.peak_bytes <= engine.info.expert_budget_bytes
            assert bool(engine.cache.ledger.counters.prefetch_loads) == (lookahead is not None)
    *others, whole = results
    expected = [output.logprobs for output in whole.outputs]
    assert all([output.logprobs for output in other.outputs] == expected for other in others)
    assert largest_error(whole) <= DEVICE_FLOAT32_LOGITS.allowed


def test_a_token_is_drawn_alike_whether_its_logits_are_read_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step of more rows than a graph has and in one of fewer, beside a row that takes the best."""
    store = make_store(FAMILY, tmp_path)
    drawn = Sampling(max_tokens=2, temperature=1.3, seed=5, ignore_eos=True)
    read: list[int] = []
    options = {"max_sequences": 2, "max_step_tokens": 12, "max_model_len": 32, "expert_budget": "100%"}
    with device_engine(store, "cpu", **options) as engine:
        told = engine.runner._tokens

        def counted(*arguments: Any) -> StepTokens:
            tokens: StepTokens = told(*arguments)
            read.append(len(tokens.read))
            return tokens

        monkeypatch.setattr(engine.runner, "_tokens", counted)
        best = submit_of(2, PROMPT, msgspec.structs.replace(drawn, temperature=0.0))
        there = answers(engine, [submit_of(1, PROMPT, drawn), best])
        assert read == [0, 0]
        here = answers(engine, [submit_of(1, PROMPT, msgspec.structs.replace(drawn, logprobs=0)), best])
        assert read == [0, 0, 1, 1]
    assert [one.token_ids for one in there] == [one.token_ids for one in here]
    assert there[0].token_ids != there[1].token_ids


@pytest.mark.parametrize("misses", ["link", "cpu"])
def test_steps_launched_behind_others_bring_the_same_tokens(tmp_path: Path, misses: str) -> None:
    """Beside each other a drawn answer and a shorter one that takes the best, few of whose experts are there."""
    store = make_store(FAMILY, tmp_path)
    how = Sampling(max_tokens=5, temperature=1.3, seed=5, ignore_eos=True)
    short = msgspec.structs.replace(how, max_tokens=3, temperature=0.0)
    found: list[list[list[int]]] = []
    with device_engine(store, "cpu", **FEW_RESIDENT, device_misses=misses) as engine:
        runner = engine.runner
        for look_ahead in (runner.look_ahead, nothing_follows):
            runner.look_ahead = look_ahead
            number = 2 * len(found)
            asked = [submit_of(number, PROMPT[:2], how), submit_of(number + 1, PROMPT[2:], short)]
            found.append([one.token_ids for one in answers(engine, asked)])
            assert (runner.steps_ahead, runner.steps_in_vain) == (3, 0), "not the first that has so few rows"
        counters = engine.cache.ledger.counters
        lookups = counters.lookups()
        runner.look_ahead = engine.core.scheduler.look_ahead
        expected = found[0][1][:2]
        [stopped] = answers(
            engine, [submit_of(8, PROMPT[2:], msgspec.structs.replace(short, stop_token_ids=expected[1:]))]
        )
        assert stopped.token_ids == expected and runner.is_ahead
        runner.idle()
        assert (runner.steps_ahead, runner.steps_in_vain) == (4, 1)
        engine.cache.settle()
        engine.cache.ledger.check()
        layers, top_k = len(store.index.layers), store.index.top_k
        assert counters.lookups() - lookups >= 2 * layers * top_k, "what ran for nobody is told as well"
        assert bool(engine.cache.tiers().computed) is (misses == "cpu")
    assert found[0] == found[1] and found[0][0] != found[0][1]


def expect_kv_to_give_way(engine: Any) -> None:
    """A lower memory budget takes blocks that nobody holds, and their memory; a higher one brings both back."""
    measured, blocks = engine.measured, engine.pool.capacity
    fixed = measured.base + measured.step + GROWTH_BYTES + measured.experts_total
    engine.storage.keys[0][blocks] = engine.storage.keys[0][1] = 1.0
    budget = LiveBudget(engine)
    low, high = (SetBudget(memory_budget_bytes=fixed + n * measured.kv_block) for n in (blocks // 2, blocks))
    assert budget.set(low).error is None and engine.pool.capacity == blocks // 2
    assert float(engine.storage.keys[0][1].min()) == 1.0 and float(engine.storage.keys[0][blocks].max()) == 0.0
    assert budget.set(high).error is None and engine.pool.capacity == blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.cache, "set_budget", refuse)
        assert budget.set(low).error == "no room, as planted" and engine.pool.capacity == blocks


def refuse(budget_bytes: int) -> None:
    raise ResourceError("no room, as planted")


def test_a_host_that_holds_half_of_the_experts_serves_layer_by_layer(tmp_path: Path) -> None:
    store = make_store(FAMILY, tmp_path)
    options = {"max_sequences": 1, "max_step_tokens": 8, "max_model_len": 32, "expert_budget": "40%"}
    with device_engine(store, "cpu", **options, host_budget="50%") as engine:
        [result] = generate(engine, [PROMPT], SAMPLING)
        engine.cache.settle()
        engine.cache.ledger.check()
        counters, read = engine.cache.ledger.counters, engine.cache.host.cache.ledger.counters.demand_loads
        assert engine.info.step_path == "layers" and 0 < read <= counters.demand_loads and sum(counters.hits) > 0
        tiers, num_steps = engine.cache.tiers(), 1 + SAMPLING.max_tokens - 1
        assert tiers.layer_waits == num_steps * engine.info.num_moe_layers
        assert tiers.link_bytes["staged"] == counters.demand_bytes == sum(tiers.link_bytes.values())
    assert largest_error(result) <= DEVICE_FLOAT32_LOGITS.allowed


FEW_RESIDENT: dict[str, Any] = {
    "max_sequences": 2, "max_step_tokens": 8, "max_model_len": 32, "expert_budget": "40%",
}  # fmt: skip


class AllKnown(NoLookahead):
    """Names nothing itself: what is known of a step is asked for when it begins."""

    exactness: Exactness = "exact"


def test_what_a_step_is_known_to_lack_is_fetched_and_changes_no_bit(tmp_path: Path) -> None:
    store = make_store(FAMILY, tmp_path)
    results: list[Generated] = []
    missed: list[int] = []
    for knows in (True, False):
        channel = make_channel("exact")
        routing = make_routing("uniform", shape_of(store.index), seed=1)
        assert routing is not None
        routes = GeneratedRoutes(routing, channel)
        options = {**FEW_RESIDENT, "expert_budget": "75%"}
        with device_engine(store, "cpu", AllKnown() if knows else None, routes, **options) as engine:
            engine.cache.foreknown = routes.step_numbers if knows else nothing_known
            results += generate(
                engine, [PROMPT[:1]], Sampling(max_tokens=5, temperature=0.0, logprobs=20, ignore_eos=True)
            )
            engine.cache.settle()
            engine.cache.ledger.check()
            counters, link = engine.cache.ledger.counters, engine.cache.link
            assert link.landed + link.read > 0 and bool(link.prefetched) is knows
            assert counters.prefetch_issued == sum(counters.covered) == counters.prefetch_used
            assert counters.evictions["capacity"] > 0
            missed.append(sum(counters.misses))
    known, unknown = results
    assert missed[0] <= len(store.index.layers) * store.index.top_k < missed[1], "the prompt's step alone misses any"
    assert [output.logprobs for output in known.outputs] == [output.logprobs for output in unknown.outputs]


def test_link_and_processor_share_what_steps_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.tiny_families._EXPERT_FFN", 96)
    halve = "expertd_engine.planning.balance.left_to_processor"
    monkeypatch.setattr(halve, lambda missing, *_: Split(missing // 2, missing % 2 * 64))
    store, prompt = make_store(FAMILY, tmp_path), PROMPT[:2]
    with device_engine(store, "cpu", **FEW_RESIDENT, device_misses="both") as engine:
        assert engine.info.numerics == "per-residency"
        [result] = generate(engine, [prompt], SAMPLING)
        engine.cache.settle()
        engine.cache.ledger.check()
        tiers, counters = engine.cache.tiers(), engine.cache.ledger.counters
        assert tiers.misses == "both" and 0 < tiers.computed < sum(counters.misses)
        assert tiers.shared is not None and tiers.shared.is_on and tiers.shared.later + tiers.shared.earlier > 0
        assert tiers.link_bytes["landed"] > 0 == engine.cache.ledger.brought_in
        record, crossed = engine.info.expert_record_bytes, tiers.link_bytes
        assert crossed["shared"] > 0 and crossed["shared"] + tiers.computed_bytes == tiers.computed * record
        assert crossed["landed"] + crossed["read"] == (sum(counters.misses) - tiers.computed) * record
        assert counters.demand_bytes == sum(crossed.values())
    assert largest_error(result, prompt=prompt) <= DEVICE_FLOAT32_LOGITS.allowed


def test_the_processor_computes_what_steps_miss(tmp_path: Path) -> None:
    store, prompt = make_store(FAMILY, tmp_path), PROMPT[:2]
    with device_engine(store, "cpu", **FEW_RESIDENT, device_misses="cpu") as engine:
        assert engine.info.numerics == "per-residency"
        [result] = generate(engine, [prompt], SAMPLING)
        engine.cache.settle()
        engine.cache.ledger.check()
        tiers = engine.cache.tiers()
        assert tiers.misses == "cpu" and tiers.cpu_bytes_per_s > 0
        assert tiers.link_bytes["landed"] == tiers.link_bytes["read"] == 0 < tiers.computed
        assert tiers.computed_bytes == tiers.computed * engine.info.expert_record_bytes
        assert tiers.link_bytes["staged"] == 0 < engine.cache.ledger.brought_in
        expect_a_lost_record_to_end_the_engine(engine)
    assert largest_error(result, prompt=prompt) <= DEVICE_FLOAT32_LOGITS.allowed


def expect_a_lost_record_to_end_the_engine(engine: Any) -> None:
    """No step waits for ever for what the processor cannot compute."""
    for layer in engine.cache.computing.layers:
        for expert in range(len(layer.addresses)):
            layer.addresses[expert] = None
    with pytest.raises(EngineError, match=r"the processor could not compute a missing expert: .* has no record"):
        generate(engine, [PROMPT[-1:]], SAMPLING, first_id=1)


def test_misses_that_the_processor_cannot_compute_are_read_over_the_link_or_refused(tmp_path: Path) -> None:
    store = make_store(FAMILY, tmp_path)
    options: dict[str, Any] = {"max_sequences": 1, "max_step_tokens": 8, "max_model_len": 32, "host_budget": "50%"}
    obstacle = "the host does not hold all experts in pinned memory"
    refused = pytest.raises(ConfigError, match=f"device_misses: 'cpu' is not allowed here: {obstacle}; give link")
    with refused, device_engine(store, "cpu", **options, device_misses="cpu"):
        pass
    with device_engine(store, "cpu", **options, device_misses="auto") as engine:
        assert engine.cache.tiers().misses == "link"
        assert f"missing experts are read over the link: {obstacle}" in engine.info.fallbacks


def test_a_family_that_the_kernels_do_not_match_runs_through_its_modules(tmp_path: Path) -> None:
    store = make_store("deepseek_v2", tmp_path)
    options = {"max_sequences": 1, "max_step_tokens": 5, "max_model_len": 16, "expert_budget": "40%"}
    with device_engine(store, "cpu", **options) as engine:
        [result] = generate(engine, [PROMPT], Sampling(max_tokens=2, temperature=0.0, logprobs=20, ignore_eos=True))
        engine.cache.settle()
        engine.cache.ledger.check()
        assert engine.info.step_path == "modules" and any("modules, slowly" in one for one in engine.info.fallbacks)
    assert largest_error(result, "deepseek_v2") <= DEVICE_FLOAT32_LOGITS.allowed


def test_foresight_is_measured_with_and_without_in_an_engine_that_is_retuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(FAMILY, tmp_path)
    spec = EngineSpec(str(store.path), "25%", routing="uniform", max_step_tokens=4, max_model_len=64, threads=1)
    request = TurnsRequest(pairs=3, settle=4, tokens=4, prompt=1)
    with closing(DeviceSession(spec, torch.device("cpu"))) as session:
        few, foreseen = session.describe().expert_budget, list[str]()

        def begin(tokens: StepTokens, experts: DeviceCache) -> Running:
            """Computes nothing: no kernel need be interpreted."""
            foreseen.append(experts.lookahead.exactness)
            experts.before_launch()
            return Running(tokens, 0, None, experts.after_launch())

        def turns(cell: Cell) -> Turns:
            session.retune(cell.budget, cell.routing, cell.hints, 1)
            return take_turns(session, request)

        monkeypatch.setattr(session._engine.runner.model, "begin", begin)
        said = json.loads(report(spec, request, [Cell("calibrated:fine", "50%", "default")], turns).splitlines()[-1])
        assert session.describe().expert_budget > few
    [cell] = said["cells"]
    assert (cell["routing"], cell["budget"], said["pairs"]) == ("calibrated:fine", "50%", 3) and cell["ratio"][
        "low"
    ] > 0
    order = [on for pair in range(3) for on in turns_of(pair, 4, 4)]
    expected = ["predicted" if on else "none" for on in order]
    assert foreseen[-len(expected) :] == expected and set(foreseen[: -len(expected)]) == {"predicted"}


def test_options_that_would_do_nothing_on_a_device_are_refused(tmp_path: Path) -> None:
    store = make_store(FAMILY, tmp_path)
    refused = {"batching": "expert-aware", "predictor": "next-gate", "trace_dir": tmp_path}
    for name, value in refused.items():
        with pytest.raises(ConfigError, match=f"{name}: .* on a device"), device_engine(store, "cpu", **{name: value}):
            pass


@torch.inference_mode()
def largest_error(result: Generated, family: str = FAMILY, prompt: Sequence[int] = PROMPT) -> float:
    """Of the best tokens' log-probabilities, against transformers' modules."""
    ids = torch.tensor([[*prompt, *result.token_ids]])
    expected = make_model(family, SEED)(ids, use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 :]
    errors = [
        abs(best.logprob - float(expected[place, best.token_id]))
        for place, output in enumerate(result.outputs)
        for best in (output.logprobs or [])[0].top
    ]
    return max(errors)
