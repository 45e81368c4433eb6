"""What plans foretold beside what was measured, on a box that is not as it was profiled: numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from expertd_engine.bench.foretold import Cell, MemoryRun, report
from expertd_engine.planning.planner import Plan

STEP_S = 0.05
"""Foretold for the budget below: 20 tokens a second."""


def plan(step_s: float, memory: int = 0) -> Plan:
    return Plan("exact", 100, 1, memory, [1], 0.9, step_s, 0.0, [])


def cell(windows_s: Sequence[float], paces: Sequence[float]) -> Cell:
    return Cell("m, r, 50%", plan(STEP_S), windows_s, paces, 0.8)


def told(cells: Sequence[Cell], memories: Sequence[MemoryRun] = (), **unanchored: str) -> tuple[str, dict[str, Any]]:
    *text, values = report(cells, memories, unanchored).splitlines()
    return "\n".join(text), json.loads(values)


def test_a_box_that_is_as_slow_in_everything_leaves_no_error_at_its_pace() -> None:
    """Half as fast as when it was profiled, then four fifths, then a quarter."""
    paces = [0.5, 0.8, 0.25]
    one = cell([STEP_S / pace for pace in paces], paces)
    assert one.tok_s == pytest.approx(10) and one.error == pytest.approx(1.0)
    assert one.pace == pytest.approx(0.5)
    assert one.error_at_pace == pytest.approx(0)


def test_what_the_plan_itself_gets_wrong_stays_at_any_pace() -> None:
    """It foretells 0.05 s where 0.04 s are taken, and a hiccup of one round is none of it."""
    paces = [1.0, 0.5, 1 / 3]
    assert cell([0.04, 0.08, 0.12], paces).error_at_pace == pytest.approx(-0.2)
    assert cell([0.04, 0.8, 0.12], paces).error_at_pace == pytest.approx(-0.2)


def test_paces_are_of_their_own_round() -> None:
    """A window is slow in the round in which the box was."""
    assert cell([0.05, 0.2, 0.1], [1.0, 0.25, 0.5]).error_at_pace == pytest.approx(0)
    with pytest.raises(ValueError, match="zip"):
        _ = cell([0.05, 0.2], [1.0]).error_at_pace


def test_without_anchors_there_is_no_pace_and_the_report_says_why() -> None:
    bare = cell([0.04], [])
    assert bare.pace is bare.error_at_pace is None
    text, values = told([bare], big="no room")
    assert "big: no pace: no room" in text and "–" in text
    assert values["largest_speed_error_at_pace"] is None and values["speed"][0]["pace"] is None
    assert values["largest_speed_error"] == pytest.approx(0.2)


def test_the_report_keeps_raw_errors_beside_those_at_pace() -> None:
    as_was, slow = cell([0.04], [1.0]), cell([0.12], [0.5])
    text, values = told([as_was, slow], [MemoryRun("m, 50%", plan(STEP_S, 103), 100)])
    assert values["largest_speed_error"] == pytest.approx(1.4)
    assert values["largest_speed_error_at_pace"] == pytest.approx(0.2)
    assert [run["pace"] for run in values["speed"]] == pytest.approx([1.0, 0.5])
    assert [run["error_at_pace"] for run in values["speed"]] == pytest.approx([-0.2, 0.2])
    assert values["speed"][1]["rounds"] == [{"tok_s": pytest.approx(1 / 0.12), "pace": 0.5}]
    assert "+140.0%" in text and "+20.0%" in text and "+3.0%" in text
    assert values["memory_over"] == pytest.approx([0.03])


def test_memory_alone_has_no_speed_to_tell_of() -> None:
    text, values = told([], [MemoryRun("m, 50%", plan(STEP_S, 99), 100)])
    assert values["largest_speed_error"] is None and "pace:" not in text
    assert values["memory_over"] == pytest.approx([-0.01])
