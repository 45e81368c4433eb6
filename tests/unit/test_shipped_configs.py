"""Every configuration that ships loads, and says how to use it."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertd_engine.config_sources import load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_there_are_some() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_loads(path: Path) -> None:
    loaded = load_config({}, {}, path)
    assert loaded.sources["model"] == str(path)
    assert f"expertd serve --config configs/{path.name}" in path.read_text()
