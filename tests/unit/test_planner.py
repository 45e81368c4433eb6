"""Plans: who gets slots, what is predicted, what is refused. Profiles are made up, so that the best answer is known."""

from __future__ import annotations

import itertools
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_engine.bench.genetic import genetic_split
from expertd_engine.config import Size, parse_size
from expertd_engine.errors import BudgetError, StoreError, UsageError
from expertd_engine.experts.policy import make_policy
from expertd_engine.experts.swaps import SwapLimits
from expertd_engine.planning.costs import Step, fit_costs
from expertd_engine.planning.planner import SPREAD, Request, make_plan, missing_s
from expertd_engine.planning.profile import (
    PROFILE_VERSION,
    BoxProfile,
    LayerCurve,
    MemoryProfile,
    MissCurve,
    ModelProfile,
    PathCurve,
    Profile,
    at_share,
    decode_profile,
)
from expertd_engine.planning.replay import Choice, replay_exact, replay_virtual
from expertd_engine.planning.split import last_gains, split_slots

RECORD, EXPERTS, TOP_K, LAYERS = 1000, 16, 2, 6


def curve(sensitivity: float = 1.0, half: float = 3.0) -> LayerCurve:
    """Mass that halves with every `half` slots."""
    slots = list(range(TOP_K, EXPERTS + 1))
    mass = [2.0 ** (-(n - TOP_K) / half) if n < EXPERTS else 0.0 for n in slots]
    return LayerCurve(slots, mass, sensitivity)


def profile(layers: list[LayerCurve] | None = None) -> Profile:
    curves = layers or [curve() for _ in range(LAYERS)]
    return Profile(
        version=PROFILE_VERSION,
        store_id="store",
        record_bytes=[RECORD] * len(curves),
        num_experts=[EXPERTS] * len(curves),
        top_k=TOP_K,
        box=BoxProfile(2, 2, "avx2", [0.001, 0.0015], step_s=0.010, leave_s=0.0002, overlap=0.8),
        memory=MemoryProfile(50_000, 10_000, 100, 16, 10**9, 512, 4, 64),
        model=ModelProfile(
            256, [MissCurve("model", [0.1, 0.5, 1.0], [0.2, 0.8, 1.0], [[3.0, 2.0], [1.0, 0.5], [0.0]])], curves
        ),
    )


def loss(curves: list[LayerCurve], slots: list[int]) -> float:
    return sum(one.loss(count) for one, count in zip(curves, slots, strict=True))


# ---------------------------------------------------------------- the split


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.5, 6)), min_size=3, max_size=3),
    st.integers(3 * TOP_K, 3 * 8),
)
def test_no_split_of_convex_losses_is_better(shapes: list[tuple[float, float]], room: int) -> None:
    curves = []
    for sensitivity, half in shapes:
        slots = list(range(TOP_K, 9))
        curves.append(LayerCurve(slots, [2.0 ** (-(n - TOP_K) / half) for n in slots], sensitivity))
    found = split_slots(curves, [RECORD] * 3, room * RECORD)
    assert sum(found) <= room
    every = [s for s in itertools.product(range(TOP_K, 9), repeat=3) if sum(s) <= room]
    assert loss(curves, found) <= min(loss(curves, list(s)) for s in every) + 1e-9


def test_layers_that_are_alike_get_as_many_slots() -> None:
    slots = split_slots([curve()] * LAYERS, [RECORD] * LAYERS, RECORD * LAYERS * 7)
    assert slots == [7] * LAYERS


def test_a_hot_layer_gets_its_slots() -> None:
    curves = [curve(sensitivity=0.01, half=1.0) for _ in range(LAYERS)]
    curves[3] = curve(sensitivity=5.0, half=6.0)
    room = RECORD * LAYERS * 4
    slots = split_slots(curves, [RECORD] * LAYERS, room)
    gains = last_gains(curves, slots)
    assert slots[3] > 2 * max(count for layer, count in enumerate(slots) if layer != 3)
    assert loss(curves, slots) < loss(curves, [4] * LAYERS)
    assert {gain.layer for gain in gains} >= {3} and gains[-1].saved > 0


def test_a_short_record_is_bought_with_what_a_long_one_leaves() -> None:
    slots = split_slots([curve(), curve()], [1000, 300], 2 * TOP_K * 650 + 1000 + 900)
    assert slots[1] > slots[0]
    assert 1000 * slots[0] + 300 * slots[1] <= 2 * TOP_K * 650 + 1900


def test_a_layer_that_loses_nothing_gets_the_fewest() -> None:
    slots = split_slots([curve(sensitivity=0.0), curve()], [RECORD] * 2, 12 * RECORD)
    assert slots[1] == 10


# ---------------------------------------------------------------- plans


def test_a_plan_says_what_its_budget_gives() -> None:
    budget = 50_000 + 10_000 + 64 * 2**20 + 48_000 + 400
    plan = make_plan(profile(), Request(memory_budget=parse_size(str(budget))))
    assert plan.expert_budget_bytes == 48_000 and plan.kv_blocks == 4
    assert plan.memory_bytes == int((1 + SPREAD) * (60_000 + 48_000 + 400)) <= budget
    assert plan.hit_rate == pytest.approx(0.8)
    assert 1 / plan.tok_s == pytest.approx(0.010 + 1.5 * 0.0002 + 0.8 * (1.0 * 0.001 + 0.5 * 0.0015))
    assert plan.divergence == 0


@pytest.mark.parametrize("mode", ["exact", "virtual"])
def test_more_memory_is_never_worse(mode: str) -> None:
    sizes = [RECORD * LAYERS * EXPERTS * share // 100 for share in range(30, 101, 5)]
    plans = [make_plan(profile(), _request(mode, "expert_budget", size)) for size in sizes]
    for less, more in itertools.pairwise(plans):
        assert more.tok_s >= less.tok_s and more.hit_rate >= less.hit_rate
        assert more.divergence <= less.divergence + 1e-12
    assert plans[-1].divergence == 0 and plans[-1].hit_rate == 1


def test_an_impossible_budget_is_refused_with_the_smallest_that_works() -> None:
    for mode in ("exact", "virtual"):
        for name in ("memory_budget", "expert_budget"):
            with pytest.raises(BudgetError) as refused:
                make_plan(profile(), _request(mode, name, 1000))
            smallest = refused.value.minimum_bytes
            make_plan(profile(), _request(mode, name, smallest))
            with pytest.raises(BudgetError):
                make_plan(profile(), _request(mode, name, smallest - 1))


def _request(mode: str, name: str, size: int) -> Request:
    return Request(mode, **{name: parse_size(str(size))})  # type: ignore[arg-type]  # names and modes are the cases


def test_a_profile_of_another_store_is_refused() -> None:
    data = msgspec.json.encode(profile())
    assert decode_profile(data, "store") == profile()
    for wrong, store in ((data, "other"), (b"{}", "store"), (b"\xff", "store")):
        with pytest.raises(StoreError, match="profile again"):
            decode_profile(wrong, store)


def test_virtual_mode_is_not_planned_without_curves_of_it() -> None:
    found = profile()
    bare = msgspec.structs.replace(found, model=msgspec.structs.replace(found.model, layers=[]))
    with pytest.raises(UsageError, match="--expert-mode virtual is not allowed for this model"):
        make_plan(bare, Request(mode="virtual"))


def test_whole_paths_are_planned_by_what_so_many_of_them_cost() -> None:
    found = profile()
    paths = PathCurve([1, 2, 4, EXPERTS], [0.4, 0.2, 0.1, 0.0], [0.3, 0.2, 0.1, 0.0])
    whole = msgspec.structs.replace(found, top_k=1, model=msgspec.structs.replace(found.model, layers=[], paths=paths))
    for slots, divergence, saved in ((4.4, 0.1, 0.05), (3.4, 0.15, 0.05), (1.4, 0.3, None)):
        plan = make_plan(whole, Request("virtual", expert_budget=Size(int(slots * LAYERS * RECORD)), share=1.0))
        held = int(slots - 2 / LAYERS)  # two records to load through
        assert plan.slots == [held] * LAYERS and plan.hit_rate == 1
        assert plan.divergence == pytest.approx(divergence)
        assert [gain.saved for gain in plan.gains] == ([] if saved is None else [pytest.approx(saved)])
    with pytest.raises(BudgetError) as refused:
        make_plan(whole, Request("virtual", expert_budget=Size(RECORD)))
    assert refused.value.minimum_bytes == (LAYERS + 2) * RECORD and "1 slots in each of 6" in str(refused.value)


@pytest.mark.parametrize(("leave_s", "overlap"), [(0.0003, 0.8), (0.0, 1.2), (0.001, 0.0)])
def test_costs_are_those_that_steps_were_made_of(leave_s: float, overlap: float) -> None:
    reads_s = [0.001, 0.0014, 0.002]
    missing = [[3.0, 1.0], [0.0, 5.0], [1.0], [], [2.0, 2.0, 2.0, 1.0]]
    steps = [Step(leave_s * sum(one) + overlap * missing_s(one, reads_s), one) for one in missing]
    assert fit_costs(steps, reads_s) == pytest.approx((leave_s, overlap), abs=1e-9)


def test_no_cost_is_below_nothing() -> None:
    steps = [Step(0.010, [10.0]), Step(0.004, [0.0, 10.0])]  # who misses more is faster
    leave_s, overlap = fit_costs(steps, [0.001, 0.002])
    assert min(leave_s, overlap) == 0 < max(leave_s, overlap)
    assert fit_costs([Step(-0.001, [3.0])], [0.001]) == (0, 0) == fit_costs([Step(0.001, [])], [0.001])


def test_values_between_measured_ones_lie_on_a_line() -> None:
    rate, missing = at_share(profile().curve("model"), 0.3)
    assert rate == pytest.approx(0.5) and missing == pytest.approx([2.0, 1.25])
    with pytest.raises(StoreError, match="'other' was not profiled: there are model"):
        profile().curve("other")
    assert missing_s([0, 0, 1.0], [0.001, 0.0015]) == pytest.approx(0.002), "reads go on at their last pace"


# ---------------------------------------------------------------- replays


def test_a_replay_meets_what_the_ledger_would() -> None:
    routes = [[[t % 4, 4 + t % 2]] for t in range(64)]
    everything = replay_exact(routes, [RECORD], [8], 8 * RECORD, make_policy("lru"), 16)
    assert everything.misses == 0 and everything.lookups == 2 * 48 and everything.hit_rate == 1
    little = replay_exact(routes, [RECORD], [8], 2 * RECORD, make_policy("lru"), 16)
    assert little.by_layer == [little.misses] and little.misses == 2 * 48
    assert little.missing() == [0.0, 1.0]


def test_a_virtual_replay_substitutes_less_with_more_slots() -> None:
    tokens = [Choice([t // 20 % 8, (t // 20 + 1 + t % 2) % 8], [0.7, 0.3], [7.0, 3.0]) for t in range(160)]
    masses = [replay_virtual(tokens, [1.0] * 8, 2, slots, SwapLimits(), 40) for slots in (2, 3, 4, 8)]
    assert masses == sorted(masses, reverse=True) and masses[-1] == 0
    assert masses[0] < 0.6, "the sets follow the text: any two experts held throughout substitute two thirds"


# ---------------------------------------------------------------- the genetic search


@pytest.mark.parametrize("seed", range(5))
def test_the_split_matches_or_beats_the_even_one_and_the_genetic_one(seed: int) -> None:
    rng = Random(seed)
    curves = [curve(rng.uniform(0.1, 4.0), rng.uniform(1.0, 6.0)) for _ in range(12)]
    room = RECORD * len(curves) * 6
    ours = loss(curves, split_slots(curves, [RECORD] * len(curves), room))
    assert ours < 0.95 * loss(curves, [6] * len(curves))
    found = genetic_split(curves, [RECORD] * len(curves), room, rounds=60, seed=seed)
    assert sum(found) * RECORD <= room
    assert ours <= loss(curves, found) + 1e-9


def test_the_genetic_search_is_no_straw_man() -> None:
    curves = [curve(sensitivity=0.01, half=1.0), curve(sensitivity=5.0, half=6.0), curve(sensitivity=0.01, half=1.0)]
    found = genetic_split(curves, [RECORD] * 3, RECORD * 3 * 6)
    best = split_slots(curves, [RECORD] * 3, RECORD * 3 * 6)
    assert loss(curves, found) <= 1.05 * loss(curves, best)
