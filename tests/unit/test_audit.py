"""The dependency audit: what is known fails it, and nothing known by nobody is not taken for safety."""

from __future__ import annotations

from typing import Any

import pytest

from tools.audit import CANARY, NoSource, audit, installed

KNOWN: dict[tuple[str, str], list[dict[str, Any]]] = {
    CANARY: [{"id": "GHSA-1", "summary": "leaks", "fixed_in": ["3.1.3"]}],
    ("torch", "0.1"): [{"id": "GHSA-2", "details": "burns", "fixed_in": []}],
    ("numpy", "2.0"): [],
}


def source(name: str, version: str) -> list[dict[str, Any]] | None:
    return KNOWN.get((name, version))


def test_a_known_vulnerability_is_told_with_its_remedy() -> None:
    found = audit([("numpy", "2.0"), CANARY, ("torch", "0.1"), ("private", "1")], source)
    assert found == [
        "jinja2 3.1.2: GHSA-1: leaks (fixed in 3.1.3)",
        "torch 0.1: GHSA-2: burns (fixed in no release)",
    ]
    assert audit([("torch", "0.1")], source, frozenset({"GHSA-2"})) == []


@pytest.mark.parametrize("answer", [None, []])
def test_a_source_that_knows_nothing_is_none(answer: list[dict[str, Any]] | None) -> None:
    with pytest.raises(NoSource, match="knows nothing of jinja2"):
        audit([("numpy", "2.0")], lambda name, version: answer)


def test_a_source_that_does_not_answer_is_none() -> None:
    def silent(name: str, version: str) -> list[dict[str, Any]] | None:
        raise OSError("no route")

    with pytest.raises(NoSource, match="no route"):
        audit([("numpy", "2.0")], silent)


def test_what_is_installed_is_found() -> None:
    packages = dict(installed())
    assert "jinja2" in packages and "expertd" not in packages and "+" not in packages["torch"]
