"""What may wait and for how long, and what a stream does while nothing happens."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

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
