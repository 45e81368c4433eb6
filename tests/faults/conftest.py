"""Servers of one's own with a fake engine, and a small real store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd_engine.prepare import prepare
from support.fake_store import write_store
from support.running_server import Start, running
from support.tiny_mixtral import make_mixtral


@pytest.fixture(scope="session")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of a store as a server with a fake engine reads."""
    return write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def start(text_store: Path) -> Iterator[Start]:
    with running(text_store) as starter:
        yield starter


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole store, of two small layers in float32."""
    folder = tmp_path_factory.mktemp("tiny")
    make_mixtral(folder / "source", num_hidden_layers=2)
    prepare(folder / "source", folder / "store", "float32")
    return folder / "store"
