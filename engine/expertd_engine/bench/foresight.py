"""`expertd bench foresight`: a governed predictor against none, in turn, for every kind of routes and budget.

Routes are uniform, calibrated, and those of a trace; what is foreseen of them is a channel of stated recall. Where the
store has a predictor of its own, the model's own routes are measured too, as it foresees them. Rounds count once the
governor has tried for the first time whether foresight pays, as it does again in a twentieth of all steps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from expertd_engine.bench.contender import Contender, Lost
from expertd_engine.bench.protocol import Decoded, DecodeRequest, EngineSpec
from expertd_engine.bench.race import Runner, enter, paired, race
from expertd_engine.bench.report import finish, number, percent, spread
from expertd_engine.bench.stats import Interval, median_interval, ratio_interval
from expertd_engine.console import Progress, silent
from expertd_engine.experts.payoff import BLOCK, GRACE, TRIAL
from expertd_engine.lab.predictor_file import has_predictor
from expertd_engine.lab.trace import SUFFIX

BUDGETS = ("25%", "50%")
HINTS = "default"
FLOOR = 0.97
"""Of its speed without foresight, below which an engine must not fall with it."""
WASTE = 0.2
"""Of prefetched bytes, at most."""
HEADER = (
    "routes", "budget", "foresees", "tok/s off", "tok/s on", "on ÷ off", "95 %", "hits off", "hits on", "ahead",
    "wasted", "read ÷ LRU",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table."""

    routing: str
    budget: str
    hints: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a cell's pairs came to."""

    cell: Cell
    off: Interval
    on: Interval
    ratio: Interval
    hits_off: float
    hits_on: float
    ahead: float
    """Bytes of prefetches that have ended, of all that was read while timed."""
    wasted: float | None
    """Of prefetched bytes, those before the timed rounds too; None where nothing was prefetched."""
    of_lru: float | None
    """Bytes read with foresight, of those that an LRU cache reads; None where nobody has replayed one."""

    @property
    def holds(self) -> bool:
        return self.ratio.low >= FLOOR and (self.wasted is None or self.wasted <= WASTE)


def cells(store: Path, routings: Sequence[str], trace: Path | None) -> list[Cell]:
    """Generated routes, those of a trace, and the model's own where the store has a predictor for them."""
    routings = [*routings, *([] if trace is None else [f"trace:{trace}"])]
    found = [Cell(routing, budget, HINTS) for routing in routings for budget in BUDGETS]
    if has_predictor(store):
        found += [Cell("model", budget, "learned") for budget in BUDGETS]
    return found


def foresight(
    spec: EngineSpec,
    request: DecodeRequest,
    pairs: int,
    timeout_s: float,
    routings: Sequence[str],
    trace: Path | None = None,
    progress: Progress = silent,
) -> str:
    """Measure every cell, one after the other: the report. Raises what starting an engine raises."""
    found = []
    wanted = cells(Path(spec.store), routings, _part(trace))
    for number_, cell in enumerate(wanted):
        progress("foresight", number_ / len(wanted))
        found.append(_measure(spec, cell, request, pairs, timeout_s))
    return _report(spec, pairs, found)


def _part(trace: Path | None) -> Path | None:
    """The first part of a folder: generated routes come from one file."""
    return next(iter(sorted(trace.glob(f"*{SUFFIX}"))), trace) if trace is not None and trace.is_dir() else trace


def _measure(spec: EngineSpec, cell: Cell, request: DecodeRequest, pairs: int, timeout_s: float) -> Found:
    off = msgspec.structs.replace(spec, routing=cell.routing, expert_budget=cell.budget, hints="none")
    on = msgspec.structs.replace(off, hints=cell.hints)
    runners = [
        Runner[Decoded](name, Contender(one, timeout_s=timeout_s), request) for name, one in (("off", off), ("on", on))
    ]
    first = settling(request)
    with ExitStack() as stack:
        enter(stack, runners)
        race(runners, first + pairs, Decoded, lambda: None)
    for runner in runners:
        if runner.lost is not None:
            raise Lost(f"{cell.routing} at {cell.budget}, foresight {runner.name}: {runner.lost}")
    without, with_ = paired(*runners)
    prefetched = sum(one.prefetched_bytes for one in with_)
    wasted = sum(one.wasted_bytes for one in with_) / prefetched if prefetched else None
    without, with_ = without[first:], with_[first:]
    ahead, lru = sum(one.prefetched_bytes for one in with_), sum(one.lru_transferred_bytes for one in with_)
    transferred = sum(one.transferred_bytes for one in with_)
    return Found(
        cell,
        median_interval([one.tok_s for one in without]),
        median_interval([one.tok_s for one in with_]),
        ratio_interval([one.tok_s for one in with_], [one.tok_s for one in without]),
        _hits(without),
        _hits(with_),
        ahead / max(1, transferred),
        wasted,
        transferred / lru if lru else None,
    )


def settling(request: DecodeRequest) -> int:
    """Rounds before the timed ones: until the governor has tried once whether foresight pays."""
    return math.ceil((GRACE + BLOCK * len(TRIAL)) / (request.warm + request.tokens))


def _hits(samples: Sequence[Decoded]) -> float:
    return sum(one.hits for one in samples) / max(1, sum(one.hits + one.late + one.misses for one in samples))


def _report(spec: EngineSpec, pairs: int, found: Sequence[Found]) -> str:
    rows = [
        (
            one.cell.routing.partition(os.sep)[0], one.cell.budget, one.cell.hints, number(one.off.median),
            number(one.on.median), number(one.ratio.median, 3), spread(one.ratio.low, one.ratio.high, 3),
            percent(one.hits_off), percent(one.hits_on), percent(one.ahead),
            percent(one.wasted), number(one.of_lru, 2),
        )
        for one in found
    ]  # fmt: skip
    values = {"command": "foresight", "pairs": pairs, "disk_mib_s": spec.disk_mib_s, "cells": list(map(_values, found))}
    disk = "" if spec.disk_mib_s is None else f", a disk of {spec.disk_mib_s:g} MiB/s"
    title = f"{Path(spec.store).name}: foresight on against off, {pairs} pairs{disk}"
    return finish(title, HEADER, rows, [*_notes(found), ""], values)


def _notes(found: Sequence[Found]) -> Iterator[str]:
    short = [one for one in found if not one.holds]
    yield f"{len(found) - len(short)} of {len(found)} hold: lower end ≥ {FLOOR}, wasted ≤ {WASTE:.0%}"
    for one in short:
        yield f"falls short: {one.cell.routing} at {one.cell.budget}"


def _values(one: Found) -> dict[str, Any]:
    return {
        "routing": one.cell.routing, "budget": one.cell.budget, "hints": one.cell.hints, "off": one.off.as_json(),
        "on": one.on.as_json(), "ratio": one.ratio.as_json(), "hits_off": one.hits_off, "hits_on": one.hits_on,
        "ahead": one.ahead, "wasted": one.wasted, "of_lru": one.of_lru,
    }  # fmt: skip
