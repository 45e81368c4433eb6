"""Servers for the tests of the API: one shared by the tests that leave it as it was, and one's own for the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from support import chat_templates
from support.fake_engine import Script
from support.fake_numbers import engine_info
from support.fake_store import write_store
from support.running_server import Server, Start, running


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def start(store: Path) -> Iterator[Start]:
    with running(store) as starter:
        yield starter


@pytest.fixture(scope="session")
def _shared(store: Path) -> Iterator[Server]:
    with running(store) as starter:
        yield starter()


@pytest.fixture
def server(_shared: Server) -> Iterator[Server]:
    """One server for many tests: its script is reset, and it must be idle and alive after each."""
    yield _shared
    _shared.script.answer = None
    _shared.script.logprob = -1.0
    _shared.script.cached_tokens = 0
    _shared.until(lambda: _shared.daemon.service.admission.used == 0)
    assert _shared.complete(max_tokens=1).status_code == 200
    assert len(_shared.launcher.engines) == 1, "the engine was restarted"


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """The official client, which refuses answers that do not match its types."""
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


@pytest.fixture(scope="session")
def _talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = write_store(tmp_path_factory.mktemp("talking"), chat_template=chat_templates.THINKING)
    with running(store) as starter:
        yield starter(Script(info=engine_info(max_model_len=4096)))


@pytest.fixture
def talking(_talking: Server) -> Iterator[Server]:
    """A server whose model has a large window, and a template with tools and thoughts."""
    yield _talking
    _talking.script.answer = None
    _talking.until(lambda: _talking.daemon.service.admission.used == 0)
    assert _talking.complete(max_tokens=1).status_code == 200


@pytest.fixture
def talking_client(talking: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=talking.url + "/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made
