"""Constraints on their way through the server: checked before anything is submitted, and their answers whole."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from expertd_engine.messages import Constraint
from expertd_server import grammar
from expertd_server.grammar import GrammarChecker
from support.fake_engine import WAIT_S
from support.running_server import Server, Start

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
PATHOLOGICAL = "a?" * 9000 + "a" * 9000


@pytest.mark.parametrize(
    ("body", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, Constraint("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"regex": "[a-z]+"}}, Constraint("regex", "[a-z]+")),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, Constraint("choice", '["yes", "no"]')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Constraint("lark", 'start: "a"')),
    ],
    ids=lambda value: value.kind if isinstance(value, Constraint) else "",
)
def test_the_engine_gets_what_the_request_asked_for(
    server: Server, body: dict[str, Any], constraint: Constraint
) -> None:
    server.script.answer = b'{"a": 1}'
    response = server.complete(**body)
    assert response.status_code == 200
    submitted = list(server.launcher.engines[0].submitted.values())[-1]
    assert submitted.sampling.constraint == constraint


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_completes_an_answer_is_part_of_it(server: Server, stream: bool) -> None:
    server.script.answer = b'{"a": 1}'
    response = server.complete(response_format={"type": "json_object"}, stream=stream, max_tokens=32)
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [event["choices"][0] for event in events]
    else:
        choices = response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == '{"a": 1}'
    assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "param", "names"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
         "response_format", "not"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs", "foo"),
        ({"structured_outputs": {"regex": PATHOLOGICAL}}, "structured_outputs", "use a simpler one"),
    ],
    ids=["keyword", "regex", "grammar", "pathological"],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_before_anything_is_submitted(
    server: Server, body: dict[str, Any], param: str, names: str, stream: bool
) -> None:
    before = len(server.launcher.engines[0].submitted)
    response = server.complete(stream=stream, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "invalid_value")
    assert names in error["message"]
    assert len(server.launcher.engines[0].submitted) == before


def test_a_stream_goes_on_while_a_grammar_is_checked(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check waits until the test has read the whole stream, and then fails."""
    os.mkfifo(held := tmp_path / "held")
    monkeypatch.setattr(grammar, "_WORKER", ("/bin/sh", "-c", f"read line < {held}; exit 1"))
    server = start()
    server.daemon.service.grammars = GrammarChecker(limit_s=WAIT_S)
    refused: list[int] = []
    body = {"structured_outputs": {"regex": "a"}}
    checked = threading.Thread(target=lambda: refused.append(server.complete(**body).status_code))
    checked.start()
    with open(held, "w") as release:  # opens once the check is there to read from it
        assert len(server.complete(max_tokens=40, stream=True).text.split("data: ")) > 40
        assert not refused
        release.write("\n")
    checked.join()
    assert refused == [400]
