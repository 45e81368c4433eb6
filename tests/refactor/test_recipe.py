"""The demo's recipe and its committed results belong together: what the report shows can be run again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from expertd_engine.refactor.demo import recipe
from expertd_engine.refactor.dense import Dense

REPORT = Path(recipe.__file__).with_name("report")
SMOL = cast("Dense", SimpleNamespace(hidden_size=576, layers=[None] * 30))
JOBS = {job.name: job for job in recipe.jobs(SMOL, compiled=True)}
RESULTS = {path.stem: json.loads(path.read_text()) for path in (REPORT / "results").glob("*.json")}


def test_each_job_has_a_name_of_its_own_and_finds_what_it_needs() -> None:
    names = [job.name for job in recipe.jobs(SMOL, compiled=True)]
    assert len(set(names)) == len(names)
    for place, job in enumerate(recipe.jobs(SMOL, compiled=True)):
        needed = {*job.best_of, *({job.teacher, job.begin} - {None, "dense"})}
        assert needed <= set(names[:place]), job.name


@pytest.mark.parametrize("name", sorted(RESULTS.keys() - {"dense", "branch-dense"}))
def test_a_committed_result_is_a_job_of_the_recipe(name: str) -> None:
    ran: dict[str, Any] = RESULTS[name]["job"]
    job = JOBS[name]
    assert ran["shape"] == (None if job.shape is None else job.shape.to_json())
    assert (ran["teacher"], tuple(ran["best_of"])) == (job.teacher, job.best_of)
    free = {"learning_rate"} if job.best_of else set()
    assert {key: value for key, value in ran["recipe"].items() if key not in free} == {
        key: getattr(job.recipe, key) for key in ran["recipe"] if key not in free
    }


def test_the_report_tells_all_results() -> None:
    text = (REPORT / "report.md").read_text()
    assert all(f"\n| {name} |" in text for name in RESULTS)
