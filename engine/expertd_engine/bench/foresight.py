"""`expertd bench foresight`: a governed predictor against none, in turn, for every kind of routes and budget.

Routes are uniform, calibrated, and those of a trace; what is foreseen of them is a channel of stated recall. Where the
store has a predictor of its own, the model's own routes are measured too, as it foresees them. One engine goes with and
without, so that nothing else differs; rounds count once the governor has tried for the first time whether foresight
pays, as it does again now and then. On a device one engine also serves all cells.

A step meets routes of its own: which are hard, chance decides, and by more than what is looked for. So a cache that
nobody can influence replays them all, and what was hard for it is taken out of the time of each step
(`stats.without_chance`). The ratio as it was met is told too, and that of processor time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from expertd_engine.bench.channel import make_channel
from expertd_engine.bench.contender import Contender, Lost
from expertd_engine.bench.protocol import Decoded, EngineSpec, Turns, TurnsRequest
from expertd_engine.bench.report import finish, number, percent, spread
from expertd_engine.bench.stats import Interval, median_interval, pairwise_interval, without_chance
from expertd_engine.bench.turns import joined, take_turns
from expertd_engine.console import Progress, silent
from expertd_engine.errors import UsageError
from expertd_engine.experts.payoff import SETTLED
from expertd_engine.lab.predictor_file import has_predictor
from expertd_engine.lab.trace import SUFFIX

BUDGETS = ("25%", "50%")
FLOOR = 0.97
"""Of its speed without foresight, below which an engine must not fall with it."""
WASTE = 0.2
"""Of prefetched bytes, at most."""
HEADER = (
    "routes", "budget", "foresees", "tok/s off", "tok/s on", "on ÷ off", "95 %", "as met", "cpu", "hits off", "hits on",
    "predicting", "ahead", "wasted", "read ÷ LRU",
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
    """Rid of chance."""
    met: Interval
    """The ratio as it was met."""
    cpu: Interval
    """Steps a second of the engine's thread's time, on ÷ off, rid of chance as well."""
    hits_off: float
    hits_on: float
    predicting: float
    """Share of the time with foresight in which it had not been switched off as not paying."""
    ahead: float
    """Bytes of prefetches that have ended, of all that was read with foresight while timed."""
    wasted: float | None
    """Of prefetched bytes, those before the timed rounds too; None where nothing was prefetched."""
    of_lru: float | None
    """Bytes read with foresight, of those that an LRU cache reads; None where nobody has replayed one."""

    @property
    def holds(self) -> bool:
        return self.ratio.low >= FLOOR and (self.wasted is None or self.wasted <= WASTE)


def cells(spec: EngineSpec, routings: Sequence[str], trace: Path | None) -> list[Cell]:
    """Generated routes and those of a trace, of which the spec's hints are given; and the model's own where something
    predicts them. Raises UsageError for hints that say nothing."""
    if make_channel(spec.hints) is None:
        raise UsageError(f"hints {spec.hints!r} foresee no given routes: give default, exact, or recalls by lead")
    routings = [*routings, *([] if trace is None else [f"trace:{trace}"])]
    found = [Cell(routing, budget, spec.hints) for routing in routings for budget in BUDGETS]
    if spec.device == "cpu" and has_predictor(Path(spec.store)):
        found += [Cell("model", budget, "learned") for budget in BUDGETS]
    return found


def asked_of(pairs: int, tokens: int) -> TurnsRequest:
    """What each cell is asked: so many pairs, once the governor has tried whether foresight pays."""
    return TurnsRequest(pairs, SETTLED, tokens, prompt=1)


def foresight(
    spec: EngineSpec,
    request: TurnsRequest,
    timeout_s: float,
    routings: Sequence[str],
    trace: Path | None = None,
    progress: Progress = silent,
) -> str:
    """Measure every cell, one after the other: the report. Raises what starting an engine raises."""
    wanted = cells(spec, routings, _part(trace))
    spec = msgspec.structs.replace(spec, max_model_len=_longest(request))
    if spec.device == "cpu":
        return report(spec, request, wanted, lambda cell: _asked(spec, cell, request, timeout_s), progress)
    from expertd_engine.bench.device_session import DeviceSession  # needs triton

    with closing(DeviceSession(_as(spec, wanted[0]))) as session:

        def turns(cell: Cell) -> Turns:
            session.retune(cell.budget, cell.routing, cell.hints, 1)
            return take_turns(session, request)

        return report(spec, request, wanted, turns, progress)


def report(
    spec: EngineSpec,
    request: TurnsRequest,
    wanted: Sequence[Cell],
    turns: Callable[[Cell], Turns],
    progress: Progress = silent,
) -> str:
    """What `turns` measures of each cell, as a table."""
    found = []
    for number_, cell in enumerate(wanted):
        progress("foresight", number_ / len(wanted))
        found.append(found_in(cell, turns(cell)))
    return _report(spec, request.pairs, found)


def _part(trace: Path | None) -> Path | None:
    """The first part of a folder: generated routes come from one file."""
    return next(iter(sorted(trace.glob(f"*{SUFFIX}"))), trace) if trace is not None and trace.is_dir() else trace


def _longest(request: TurnsRequest) -> int:
    """Tokens of a sequence, in whole blocks and with some to spare."""
    tokens = request.prompt + request.settle + 2 * request.pairs * request.tokens
    return -(-(tokens + 64) // 64) * 64


def _as(spec: EngineSpec, cell: Cell) -> EngineSpec:
    return msgspec.structs.replace(spec, routing=cell.routing, expert_budget=cell.budget, hints=cell.hints)


def _asked(spec: EngineSpec, cell: Cell, request: TurnsRequest, timeout_s: float) -> Turns:
    """What a process of the cell's own measures."""
    try:
        with Contender(_as(spec, cell), timeout_s=timeout_s) as contender:
            return contender.ask(request, Turns)
    except Lost as reason:
        raise Lost(f"{cell.routing} at {cell.budget}: {reason}") from None


def found_in(cell: Cell, turns: Turns) -> Found:
    """The turns' figures."""
    without, with_ = [joined(steps) for steps in turns.off], [joined(steps) for steps in turns.on]
    ahead, lru = sum(one.prefetched_bytes for one in without + with_), sum(one.lru_transferred_bytes for one in with_)
    transferred = sum(one.transferred_bytes for one in with_)
    return Found(
        cell,
        median_interval([one.tok_s for one in without]),
        median_interval([one.tok_s for one in with_]),
        _ratio(turns, lambda one: one.elapsed_s),
        pairwise_interval([on.tok_s / off.tok_s for on, off in zip(with_, without, strict=True)]),
        _ratio(turns, lambda one: one.cpu_s),
        _hits(without),
        _hits(with_),
        turns.predicting,
        ahead / max(1, transferred),
        turns.wasted_bytes / turns.prefetched_bytes if turns.prefetched_bytes else None,
        transferred / lru if lru else None,
    )


def _ratio(turns: Turns, seconds: Callable[[Decoded], float]) -> Interval:
    """How much quicker a pair's steps with foresight were, rid of chance."""
    groups = [*turns.off, *turns.on]
    times = without_chance(
        [list(map(seconds, steps)) for steps in groups], [[float(one.hardness) for one in steps] for steps in groups]
    )
    pairs = len(turns.off)
    return pairwise_interval([sum(off) / sum(on) for off, on in zip(times[:pairs], times[pairs:], strict=True)])


def _hits(samples: Sequence[Decoded]) -> float:
    return sum(one.hits for one in samples) / max(1, sum(one.lookups for one in samples))


def _report(spec: EngineSpec, pairs: int, found: Sequence[Found]) -> str:
    rows = [
        (
            one.cell.routing.partition(os.sep)[0], one.cell.budget, one.cell.hints, number(one.off.median),
            number(one.on.median), number(one.ratio.median, 3), spread(one.ratio.low, one.ratio.high, 3),
            f"{number(one.met.median, 3)} ({spread(one.met.low, one.met.high, 3)})",
            f"{number(one.cpu.median, 3)} ({spread(one.cpu.low, one.cpu.high, 3)})",
            percent(one.hits_off), percent(one.hits_on), percent(one.predicting), percent(one.ahead),
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
        "on": one.on.as_json(), "ratio": one.ratio.as_json(), "met": one.met.as_json(), "cpu": one.cpu.as_json(),
        "hits_off": one.hits_off, "hits_on": one.hits_on, "predicting": one.predicting, "ahead": one.ahead,
        "wasted": one.wasted, "of_lru": one.of_lru,
    }  # fmt: skip
