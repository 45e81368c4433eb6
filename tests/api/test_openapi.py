"""/openapi.json declares every status that a route answers with, and the body of each error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from expertd_server.auth import KeyRing
from support.fake_engine import Script
from support.running_server import Server, Start, running

KEY = {"authorization": "Bearer k"}
ERROR = {"$ref": "#/components/schemas/ErrorBody"}


@pytest.fixture(scope="module")
def provoked(store: Path) -> Iterator[Server]:
    with running(store) as start:
        yield start(keys=KeyRing.of(["k"]), max_per_key=1)


def operations(description: Any) -> list[tuple[str, str, Any]]:
    return [(method, path, what) for path, methods in description["paths"].items() for method, what in methods.items()]


def provoke(server: Server, method: str, path: str) -> Iterator[httpx.Response]:
    """Answers of every kind that one client can bring about."""

    def send(**more: Any) -> httpx.Response:
        return server.http.request(method, path.replace("{model_id}", "none"), **{"headers": KEY, **more})

    yield send()
    yield send(headers={})
    if method == "post":
        json_type = {**KEY, "content-type": "application/json"}
        yield send(content=b"{}", headers={**KEY, "content-type": "text/plain"})
        yield send(content=b"{", headers=json_type)
        yield send(content=b"{}", headers=json_type)
        yield send(content=b" " * 200_000, headers=json_type)
        for model in ("", "other"):
            for n in (1, 2, 100):
                texts = {"prompt": "a", "tokens": [1], "input": "a", "messages": [{"role": "user", "content": "a"}]}
                yield send(json={**texts, "model": model, "n": n})


def test_every_answer_is_declared(provoked: Server) -> None:
    description = provoked.http.get("/openapi.json", headers=KEY).json()
    seen = set()
    for method, path, operation in operations(description):
        for response in provoke(provoked, method, path):
            status = str(response.status_code)
            assert status in operation["responses"], (method, path, status, response.text[:200])
            seen.add((path, status))
            if response.status_code >= 400:
                assert {"message", "type", "param", "code"} <= response.json()["error"].keys()
                assert operation["responses"][status]["content"]["application/json"]["schema"] == ERROR
    everything = {"200", "400", "401", "404", "413", "415", "429"}
    assert {status for path, status in seen if path == "/v1/completions"} == everything
    assert {("/v1/models/{model_id}", "404"), ("/tokenize", "413"), ("/metrics", "401")} <= seen


def test_answers_of_a_server_that_cannot_serve_are_declared(start: Start) -> None:
    server = start(Script(), ready=False)
    for method, path, operation in operations(server.http.get("/openapi.json").json()):
        response = server.http.request(method, path.replace("{model_id}", "none"))
        assert str(response.status_code) in operation["responses"], (method, path)


def test_whatever_reads_a_body_says_which(server: Server) -> None:
    description = server.http.get("/openapi.json").json()
    for method, path, operation in operations(description):
        assert ("requestBody" in operation) == (method in ("post", "put")), path
        if method in ("post", "put"):
            name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            assert description["components"]["schemas"][name]["type"] == "object"
            assert {"400", "401", "413", "415", "500", "503"} <= operation["responses"].keys(), path
            assert path.startswith("/admin/") or "404" in operation["responses"], path


def test_the_description_refers_to_nothing_that_it_lacks(server: Server) -> None:
    description = server.http.get("/openapi.json").json()

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    known = {f"#/components/schemas/{name}" for name in description["components"]["schemas"]}
    assert set(references(description)) <= known
