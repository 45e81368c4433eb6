"""What plans foretold beside what was measured, on a box whose pace may have changed since it was profiled. Pure.

A box is slower while its neighbours are busy, and errors of a plan that was made on a quiet one then say nothing of the
plan. So decode with every expert resident, an *anchor*, is timed in turns with each window: the profile tells how fast
that was when the box was profiled. What reads cost a step keeps this pace too: it was fitted to steps, not to the disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from expertd_engine.bench.report import finish, mebibytes, number, percent
from expertd_engine.planning.planner import Plan

HEADER = (
    "model, routing, budget", "foretold tok/s", "measured", "error", "pace", "error at pace", "hits foretold",
    "measured",
)  # fmt: skip
MEMORY_HEADER = ("model, budget", "foretold memory", "measured", "over")
NOTE = (
    "pace: tok/s with every expert resident, timed in turns with each window, over what the profile foretells of it; "
    "the median of rounds. Error at pace: of what is foretold at the pace of each round; at 100 % what is left is noise"
)


@dataclass(frozen=True, slots=True)
class Cell:
    """Of one model, routing and budget."""

    label: str
    plan: Plan
    windows_s: Sequence[float]
    """Of each round: seconds a token."""
    paces: Sequence[float]
    """Of as many rounds, against the profile: 1 as when the box was profiled, above 1 faster; empty where there can be
    no anchor."""
    hit_rate: float

    @property
    def tok_s(self) -> float:
        return 1 / median(self.windows_s)

    @property
    def error(self) -> float:
        """Of the plan: above 0, it foretold too much."""
        return self.plan.tok_s / self.tok_s - 1

    @property
    def pace(self) -> float | None:
        return median(self.paces) if self.paces else None

    @property
    def error_at_pace(self) -> float | None:
        """As `error`, of what is foretold at the pace that the box had in each round; None without. Raises ValueError
        for paces of another number of rounds."""
        if not self.paces:
            return None
        rounds = zip(self.windows_s, self.paces, strict=True)
        return median(window_s * pace / self.plan.step_s for window_s, pace in rounds) - 1


@dataclass(frozen=True, slots=True)
class MemoryRun:
    """Of one budget: the plan, and what was seen."""

    label: str
    plan: Plan
    used: int

    @property
    def over(self) -> float:
        """Share by which the plan is above the most that was used."""
        return self.plan.memory_bytes / self.used - 1


def report(cells: Sequence[Cell], memories: Sequence[MemoryRun], unanchored: Mapping[str, str]) -> str:
    """`unanchored`: by model and routing, why it has no anchors."""
    at_pace = [error for cell in cells if (error := cell.error_at_pace) is not None]
    notes = [
        *([NOTE] if at_pace else []),
        *(f"{name}: no pace: {reason}" for name, reason in unanchored.items()),
        *([" · ".join(MEMORY_HEADER)] if memories else []),
        *(
            f"{one.label} · {mebibytes(one.plan.memory_bytes)} · {mebibytes(one.used)} · {one.over:+.1%}"
            for one in memories
        ),
    ]
    values = {
        "command": "planner",
        "speed": list(map(_values, cells)),
        "memory": [
            {"run": one.label, "foretold_bytes": one.plan.memory_bytes, "used_bytes": one.used} for one in memories
        ],
        "largest_speed_error": max((abs(cell.error) for cell in cells), default=None),
        "largest_speed_error_at_pace": max(map(abs, at_pace), default=None),
        "memory_over": [one.over for one in memories],
    }
    return finish("plans beside measurements", HEADER, list(map(_row, cells)), notes, values)


def _values(cell: Cell) -> dict[str, object]:
    return {
        "run": cell.label, "foretold_tok_s": cell.plan.tok_s, "tok_s": cell.tok_s, "pace": cell.pace,
        "error_at_pace": cell.error_at_pace,
        "rounds": [
            {"tok_s": 1 / window_s, "pace": pace} for window_s, pace in zip(cell.windows_s, cell.paces, strict=False)
        ],
    }  # fmt: skip


def _row(cell: Cell) -> list[str]:
    at_pace = cell.error_at_pace
    return [
        cell.label, number(cell.plan.tok_s), number(cell.tok_s), f"{cell.error:+.1%}", number(cell.pace),
        "–" if at_pace is None else f"{at_pace:+.1%}", percent(cell.plan.hit_rate),
        percent(cell.hit_rate),
    ]  # fmt: skip
