"""`expertd bench readme`: what routes that are known ahead buy a server, on bursty traces of conversations.

Hit ratios and latencies by simulation (the engine's own scheduler, ledger and lookahead over costs measured on this
box), and the same traces on the real engine. Writes JSON and plots; prints the table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from expertd_engine.bench.readme_plots import draw
from expertd_engine.bench.readme_real import run_real
from expertd_engine.bench.readme_record import record, recording_config
from expertd_engine.bench.readme_sim import Arm, Costs, Outcome, Room, Simulation, clairvoyant_hits
from expertd_engine.bench.readme_traces import Arrival, Recorded, make_trace
from expertd_engine.bench.report import finish, number, percent, spread
from expertd_engine.bench.slow_disk import open_store
from expertd_engine.bench.stats import percentile, ratio_interval
from expertd_engine.console import Progress
from expertd_engine.errors import UsageError
from expertd_engine.pictures import need_matplotlib

EXCHANGES = 24
"""Of each domain, recorded once."""
SIM_LAYERS = 10
"""Layers of the simulated model, each of which stands for several where the model has more."""
HIT_LAYERS = 6
"""Layers in the replays that count hits."""
READ_ME = Arm("expert-aware", "next-use", prefetch=True)
ON_DEMAND = replace(READ_ME, prefetch=False)
BASELINES = (Arm("decode-first", "lru", prefetch=False), Arm("prefill-first", "lru", prefetch=False))
STRONGER = (Arm("decode-first", "next-use", prefetch=True), Arm("prefill-first", "next-use", prefetch=True))
ARMS = (*BASELINES, *STRONGER, ON_DEMAND, READ_ME)


RealArms = Literal["all", "prefetch"]
"""Which ways of serving run for real: `prefetch` are those that differ by it alone."""
REAL: dict[RealArms, tuple[Arm, ...]] = {
    "all": (BASELINES[0], STRONGER[0], ON_DEMAND, READ_ME),
    "prefetch": (ON_DEMAND, READ_ME),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What to measure. For every layer `cached` experts have a slot; `load` is requests arriving over requests that the
    best baseline serves when it never has to wait for one."""

    traces: int = 10
    requests: int = 48
    cached: int = 3
    load: float = 0.7
    max_sequences: int = 64
    max_step_tokens: int = 16
    patience: int = 32
    real_requests: int = 0
    """Of each real trace; 0: no real run."""
    real_arms: RealArms = "all"
    real_only: bool = False
    """Leaves the simulation out."""
    disk_mib_s: int | None = None
    """Experts are read as from a disk of that pace; None: as quickly as they come."""
    threads: int | None = None
    io_threads: int = 2

    def room(self, layers: int, cached: int | None = None) -> Room:
        slots = (cached or self.cached) * layers
        return Room(slots, self.max_sequences, self.max_step_tokens, self.patience)


def readme(path: Path, texts: Path, out: Path, asked: Asked, progress: Progress) -> str:
    """Everything, into the folder `out`. Returns what is printed.

    Raises UsageError for a model of another kind, without matplotlib, and where nothing is asked for.
    """
    if asked.real_only and not asked.real_requests:
        raise UsageError("--real-only without --real N measures nothing")
    need_matplotlib()  # before minutes of work
    store = open_store(path, asked.disk_mib_s)
    progress("record", 0.0)
    config = recording_config(asked.max_step_tokens, asked.threads, asked.io_threads)
    recording = record(store, texts, EXCHANGES, config, out / "recorded.json", asked.disk_mib_s)
    costs = recording.costs.folded(min(SIM_LAYERS, recording.costs.layers))
    hits: dict[int, dict[str, float]] = {}
    outcomes: dict[str, list[Outcome]] = {}
    if not asked.real_only:
        traces = make_traces(recording.exchanges, costs, asked, asked.requests)
        progress("hits", 0.0)
        hits = hit_ratios(costs, traces, asked)
        outcomes = simulate(costs, traces, asked, progress)
    real: dict[str, list[Outcome]] = {}
    if asked.real_requests:
        progress("real", 0.0)
        arms = REAL[asked.real_arms]
        short = make_traces(recording.exchanges, costs, asked, asked.real_requests)
        runs = run_real(store, arms, asked.room(recording.costs.layers), short, asked.threads, asked.io_threads)
        real = {arm.name: run for arm, run in zip(arms, runs, strict=True)}
    values = summary(recording.costs, hits, outcomes, real, asked)
    (out / "readme.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    if not asked.real_only:
        draw(values, out)
    return report(values, asked)


def simulate(
    costs: Costs, traces: Sequence[Sequence[Arrival]], asked: Asked, progress: Progress
) -> dict[str, list[Outcome]]:
    """Every trace through every arm, by the arm's name."""
    outcomes = {}
    for place, arm in enumerate(ARMS):
        progress("simulate", place / len(ARMS))
        outcomes[arm.name] = [Simulation(costs, arm, asked.room(costs.layers)).run(trace) for trace in traces]
    return outcomes


def make_traces(exchanges: Sequence[Recorded], costs: Costs, asked: Asked, requests: int) -> list[list[Arrival]]:
    """One for each seed, at the pace that `load` says."""
    at_once = [replace(arrival, at_s=0.0) for arrival in make_trace(exchanges, 2 * requests, 1.0, 0)]
    simulation = Simulation(costs, STRONGER[0], asked.room(costs.layers))
    simulation.run(at_once)
    per_second = asked.load * len(at_once) / simulation.clock.now
    return [make_trace(exchanges, requests, per_second, seed) for seed in range(asked.traces)]


def hit_ratios(costs: Costs, traces: Sequence[Sequence[Arrival]], asked: Asked) -> dict[int, dict[str, float]]:
    """By experts cached for each layer, then policy: share of lookups that hit, on demand, over the same steps.

    Reads take no time here, so that all policies see the same steps. Layers route alike and share their slots: a few
    stand for all.
    """
    few = replace(costs, layers=HIT_LAYERS, read_s=0.0)
    found: dict[int, dict[str, float]] = {}
    for cached in range(2, 6):
        room = asked.room(HIT_LAYERS, cached)
        of: dict[str, float] = {}
        runs: list[Outcome] = []
        for arm in (BASELINES[0], replace(STRONGER[0], prefetch=False)):
            runs = [Simulation(few, arm, room).run(trace) for trace in traces]
            of[arm.policy] = sum(run.hits for run in runs) / sum(run.lookups for run in runs)
        best = [clairvoyant_hits(run.uses, HIT_LAYERS, room.slots) for run in runs]
        of["clairvoyant"] = sum(hit for hit, _ in best) / sum(count for _, count in best)
        found[cached] = of
    return found


def summary(
    costs: Costs, hits: dict[int, dict[str, float]], outcomes: dict[str, list[Outcome]],
    real: dict[str, list[Outcome]], asked: Asked,
) -> dict[str, Any]:  # fmt: skip
    """All figures, as JSON."""
    simulated = {name: figures(runs) for name, runs in outcomes.items()}
    values = {
        "costs": costs.to_json(),
        "cached": asked.cached,
        "disk_mib_s": asked.disk_mib_s,
        "traces": asked.traces,
        "fairness_bound_steps": asked.patience + asked.max_sequences - 1,
        "hit_ratios": {str(cached): of for cached, of in hits.items()},
        "simulated": simulated,
        "real": {name: figures(runs) for name, runs in real.items()},
    }
    if real:
        values["real_ratios"] = {
            f"{READ_ME.name} / {other}": _paired(real[READ_ME.name], real[other])
            for other in real
            if other != READ_ME.name
        }
    return values


def figures(runs: Sequence[Outcome]) -> dict[str, float]:
    """Of all requests of all traces; latencies in milliseconds."""
    per_token = [1e3 * s for run in runs for s in run.per_token_s]
    first = [1e3 * s for run in runs for s in run.first_token_s]
    full = sum(run.full_steps for run in runs)
    lookups = sum(run.lookups for run in runs)
    return {
        "mean_ms": mean(per_token), "p95_ms": percentile(per_token, 0.95),
        "ttft_mean_ms": mean(first), "ttft_p95_ms": percentile(first, 0.95),
        "unique": sum(run.unique for run in runs) / full if full else 0.0,
        "hit_ratio": sum(run.hits for run in runs) / lookups if lookups else 0.0,
        "passed_over": max(run.passed_over for run in runs),
    }  # fmt: skip


def _paired(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> dict[str, float]:
    """Ratio of mean latencies a token, trace by trace: median and bounds of its bootstrap interval."""
    return ratio_interval([mean(r.per_token_s) for r in ours], [mean(r.per_token_s) for r in theirs]).as_json()


def report(values: dict[str, Any], asked: Asked) -> str:
    """The tables for people, the figures for programs."""
    rows = [_row(name, of) for name, of in values["simulated"].items()]
    rows += [_row(f"real: {name}", of) for name, of in values["real"].items()]
    notes = [
        f"{asked.cached} of {values['costs']['experts']} experts cached, {asked.traces} traces; latency is from "
        f"arrival to the end over tokens of the answer; unique: experts of steps of {asked.max_step_tokens} tokens; "
        f"nobody may be passed over more than {values['fairness_bound_steps']} steps in a row"
        + ("" if asked.disk_mib_s is None else f"; a disk of {asked.disk_mib_s} MiB/s"),
        *(
            f"hits with {cached} cached: " + ", ".join(f"{name} {percent(one)}" for name, one in of.items())
            for cached, of in values["hit_ratios"].items()
        ),
        *(
            f"{name}: {one['median']:.2f} ({spread(one['low'], one['high'])})"
            for name, one in values.get("real_ratios", {}).items()
        ),
    ]
    header = ["", "mean ms/token", "p95", "TTFT ms", "p95", "unique", "hits", "passed over"]
    return finish("expertd bench readme", header, rows, notes, values)


def _row(name: str, of: dict[str, float]) -> list[str]:
    known = bool(of["unique"])
    return [
        name, number(of["mean_ms"], 1), number(of["p95_ms"], 1), number(of["ttft_mean_ms"], 0),
        number(of["ttft_p95_ms"], 0), number(of["unique"] if known else None),
        percent(of["hit_ratio"] if known else None), number(of["passed_over"] if known else None, 0),
    ]  # fmt: skip
