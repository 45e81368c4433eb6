"""The simulated box of `bench readme`: deterministic, obeys its own arithmetic, and all of a trace is served."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from expertd_engine.bench.readme import Asked, readme
from expertd_engine.bench.readme_sim import Arm, Costs, Outcome, Room, Simulation, clairvoyant_hits
from expertd_engine.bench.readme_traces import Arrival, Recorded, make_trace
from expertd_engine.console import silent
from expertd_engine.errors import UsageError

COSTS = Costs(layers=3, experts=6, step_s=0.003, row_s=0.001, expert_s=0.003, read_s=0.004, readers=2)
ROOM = Room(slots=9, max_sequences=12, max_step_tokens=4, patience=5)
READ_ME = Arm("expert-aware", "next-use", prefetch=True)
DECODE_FIRST = Arm("decode-first", "next-use", prefetch=True)


def exchanges() -> list[Recorded]:
    rng = random.Random(0)
    return [
        Recorded(str(domain), prompt := list(range(rng.randint(2, 9))), answer := list(range(rng.randint(4, 12))),
                 [domain] * (len(prompt) + len(answer)))
        for domain in range(6) for _ in range(4)
    ]  # fmt: skip


def run(arm: Arm, trace: list[Arrival], room: Room = ROOM, costs: Costs = COSTS) -> Outcome:
    return Simulation(costs, arm, room).run(trace)


def test_a_trace_has_its_mean_pace_its_bursts_and_its_seed() -> None:
    traces = [make_trace(exchanges(), 200, 5.0, seed) for seed in range(30)]
    assert traces[0] == make_trace(exchanges(), 200, 5.0, 0) != traces[1]
    assert 0.85 < sum(trace[-1].at_s for trace in traces) / 30 / (199 / 5.0) < 1.15
    gaps = sorted(later.at_s - one.at_s for one, later in pairwise(traces[0]))
    assert gaps[100] < 0.05 < 0.5 < gaps[-1]


def test_one_request_alone_takes_what_its_steps_cost() -> None:
    alone = [Arrival(2.0, Recorded("a", [1, 2, 3], [4, 5], [0] * 4))]
    all_resident = replace(COSTS, read_s=0.0)
    outcome = run(DECODE_FIRST, alone, costs=all_resident)
    first = 0.003 + 3 * 0.001 + 0.003
    assert outcome.first_token_s == [pytest.approx(first)]
    assert outcome.per_token_s == [pytest.approx((first + 0.003 + 0.001 + 0.003) / 2)]


def test_the_same_trace_gives_the_same_latencies() -> None:
    trace = make_trace(exchanges(), 30, 40.0, 3)
    assert run(READ_ME, trace) == run(READ_ME, trace)


@pytest.mark.parametrize("batching", ["decode-first", "prefill-first", "expert-aware"])
def test_all_are_served_and_nobody_is_passed_over_beyond_the_bound(batching: str) -> None:
    trace = make_trace(exchanges(), 40, 60.0, 5)
    outcome = run(Arm(batching, "next-use", prefetch=True), trace)  # type: ignore[arg-type]  # a batching
    assert len(outcome.per_token_s) == 40 and min(outcome.per_token_s) > 0 and min(outcome.first_token_s) > 0
    if batching == "expert-aware":
        assert 0 < outcome.passed_over <= ROOM.patience + ROOM.max_sequences - 1


def test_steps_by_experts_use_fewer_of_them_and_prefetch_hides_reads() -> None:
    traces = [make_trace(exchanges(), 40, 60.0, seed) for seed in range(3)]
    unique = {arm: [run(arm, trace) for trace in traces] for arm in (READ_ME, DECODE_FIRST)}
    each = {arm: sum(o.unique for o in runs) / sum(o.full_steps for o in runs) for arm, runs in unique.items()}
    assert each[READ_ME] < 0.8 * each[DECODE_FIRST]
    on_demand = sum(sum(run(replace(READ_ME, prefetch=False), trace).per_token_s) for trace in traces)
    assert sum(sum(outcome.per_token_s) for outcome in unique[READ_ME]) < on_demand


def test_a_run_without_anything_to_measure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--real-only without --real N"):
        readme(tmp_path, tmp_path, tmp_path, Asked(real_only=True), silent)


def test_who_knows_all_evicts_what_is_needed_last() -> None:
    steps = [frozenset({one}) for one in (0, 1, 2, 0, 1, 3, 0)]
    assert clairvoyant_hits(steps, layers=1, slots=2) == (2, 7)
    assert clairvoyant_hits(steps, layers=1, slots=4) == (3, 7)
    assert clairvoyant_hits([frozenset({0, 1})] * 5, layers=2, slots=4) == (16, 20)
