"""What may wait and for how long, and what a stream does while nothing happens."""

from __future__ import annotations

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from expertd_engine.config import Size
from expertd_engine.messages import Constraint
from expertd_server.grammar import GrammarChecker
from support.fake_engine import WAIT_S, Script
from support.running_server import Server, Start


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_not_begun_in_time_is_refused(start: Start, stream: bool) -> None:
    server = start(Script(held=True), max_queue_wait_s=0.05)
    response = server.complete(stream=stream, n=2)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert int(response.headers["retry-after"]) > 0
    server.engine.wait_for(lambda: sorted(server.engine.aborted) == sorted(server.engine.submitted))
    assert server.daemon.service.admission.used == 0
    server.engine.allow(100)
    assert server.complete(stream=stream).status_code == 200


def test_what_has_begun_may_take_its_time(start: Start) -> None:
    server = start(Script(held=True), max_queue_wait_s=0.05)
    server.engine.allow(1)
    with ThreadPoolExecutor() as pool:
        begun = pool.submit(server.complete, max_tokens=3)
        server.until(lambda: server.daemon.service.admission.used == 1)
        waiting = server.complete()
        assert waiting.status_code == 503, "its patience ended after that of the other began"
        server.engine.allow(10)
        assert begun.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_tokens_that_wait_are_bounded(start: Start, stream: bool) -> None:
    server = start(Script(held=True), max_queued_tokens=10)
    never = server.complete(prompt=["abc", "def"], n=2, stream=stream)
    assert (never.status_code, never.headers["x-should-retry"]) == (503, "false")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(server.complete, prompt="12345678", max_tokens=3)
        server.until(lambda: server.daemon.service.admission.queued_tokens == 8)
        refused = server.complete(prompt="abc", stream=stream)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
        assert int(refused.headers["retry-after"]) > 0
        server.engine.allow(1)
        server.until(lambda: server.daemon.service.admission.queued_tokens == 0)
        assert server.daemon.service.admission.used == 1, "it has begun, and is not over"
        server.engine.allow(100)
        assert first.result().status_code == 200
    assert server.complete(prompt="abc", stream=stream).status_code == 200


class _Gate(GrammarChecker):
    """Says nothing of any grammar before `opened`."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = asyncio.Event()
        self.asked = 0

    async def check(self, constraint: Constraint, *, param: str) -> None:
        self.asked += 1
        await self.opened.wait()


def _refused_for_bodies(server: Server, path: str = "/v1/completions") -> None:
    response = server.http.post(path, json={"prompt": "Hi", "user": "b" * 600})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert "bodies" in response.json()["error"]["message"]
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_bodies_that_are_being_read_are_bounded_together(start: Start, path: str) -> None:
    server = start(max_bodies=Size(bytes=1000))
    bodies = server.daemon.service.bodies
    body = json.dumps({"prompt": "Hi", "max_tokens": 1, "user": "a" * 600}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:-1])
        server.until(lambda: bodies.used == len(body) - 1)
        _refused_for_bodies(server, path)
        assert bodies.used == len(body) - 1, "what is refused takes no room"
        assert server.complete().status_code == 200, "a small one fits beside it"
        connection.sendall(body[-1:])
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    assert bodies.used == 0
    assert server.complete(user="b" * 600).status_code == 200
    refused = server.metrics()['expertd_requests_rejected_total{reason="bodies"}']
    assert refused == (1 if path == "/v1/completions" else 0), "requests for text alone are counted"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "Hi", "response_format": {"type": "json_object"}}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hi"}], "response_format": {"type": "json_object"}},
        ),
        ("/v1/responses", {"input": "Hi", "text": {"format": {"type": "json_object"}}}),
    ],
    ids=["completions", "chat", "responses"],
)
def test_a_body_counts_until_its_request_is_planned_and_no_longer(
    start: Start, path: str, asked: dict[str, object]
) -> None:
    server = start(Script(held=True), max_bodies=Size(bytes=1000))
    service, gate = server.daemon.service, _Gate()
    service.grammars = gate
    with ThreadPoolExecutor() as pool:
        first = pool.submit(server.http.post, path, json={**asked, "user": "a" * 600})
        server.until(lambda: gate.asked == 1)
        _refused_for_bodies(server)
        server.on_loop(gate.opened.set)
        server.until(lambda: len(server.engine.submitted) == 1)
        assert service.bodies.used == 0, "the engine has it"
        second = pool.submit(server.complete, user="b" * 600)
        server.until(lambda: len(server.engine.submitted) == 2)
        server.engine.allow(1000)
        assert (first.result().status_code, second.result().status_code) == (200, 200)


def test_a_body_whose_client_leaves_or_that_is_no_json_counts_no_longer(start: Start) -> None:
    server = start(max_bodies=Size(bytes=1000))
    bodies = server.daemon.service.bodies
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(head + b"a" * 800)
        server.until(lambda: bodies.used == 800)
    server.until(lambda: bodies.used == 0)
    bad = server.http.post("/v1/completions", content=b"a" * 900, headers={"content-type": "application/json"})
    assert bad.status_code == 400
    assert bodies.used == 0


def test_one_body_alone_may_pass_the_bound(start: Start) -> None:
    server = start(max_bodies=Size(bytes=100))
    assert server.complete(user="a" * 600).status_code == 200


def test_a_silent_stream_gets_comments_that_clients_overlook(start: Start) -> None:
    server = start(Script(held=True), sse_keep_alive_s=0.01)
    server.engine.allow(1)
    with httpx.stream("POST", server.url + "/v1/completions", json={"prompt": "a", "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert [next(lines) for _ in range(5)] == ["", ": keep-alive", "", ": keep-alive", ""]
        server.engine.allow(100)
        rest = [line for line in lines if line and not line.startswith(":")]
    assert rest[-1] == "data: [DONE]"


def test_comments_can_be_left_out(start: Start) -> None:
    server = start(sse_keep_alive_s=0.0)
    assert ":" not in {line[:1] for line in server.complete(stream=True).text.splitlines()}


@pytest.mark.parametrize("path", ["/live", "/ready", "/health", "/version"])
def test_head_asks_as_get_does(server: Server, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(f"HEAD {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"\r\n\r\n"), "no body"
