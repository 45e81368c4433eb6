"""Disconnects, overload, engine death and restart, drain: every request ends once, and the server goes on."""

from __future__ import annotations

import concurrent.futures
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from expertd_engine.errors import EngineError, ExpertdError
from expertd_engine.messages import Fatal
from expertd_server.launcher import ChildFailed
from expertd_server.remote import shown
from support.fake_engine import WAIT_S, FakeEngine, Script
from support.fake_numbers import engine_info
from support.running_server import Server, Start

ABORTED = 'expertd_requests_total{endpoint="/v1/completions",finish_reason="abort"}'
FAILED = 'expertd_requests_total{endpoint="/v1/completions",finish_reason="error"}'


def send(server: Server, **body: Any) -> socket.socket:
    """A raw request; closing the socket is a disconnect."""
    content = json.dumps({"prompt": "Hi", **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


def in_background(call: Callable[[], httpx.Response]) -> concurrent.futures.Future[httpx.Response]:
    """Start a request in a thread of its own."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def background(server: Server, **body: Any) -> concurrent.futures.Future[httpx.Response]:
    return in_background(
        lambda: httpx.post(server.url + "/v1/completions", json={"prompt": "Hi", **body}, timeout=WAIT_S)
    )


def submitted(engine: FakeEngine, count: int) -> Callable[[], bool]:
    return lambda: len(engine.submitted) >= count


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("body", [{}, {"n": 2, "prompt": ["a", "b"]}])
def test_a_client_that_leaves_has_its_sequences_aborted(
    start: Start, body: dict[str, object], steps: int, stream: bool
) -> None:
    """In the queue (no step yet) and while generating, for every sequence of the request."""
    server = start(Script(held=True))
    connection = send(server, stream=stream, max_tokens=50, **body)
    count = 4 if body else 1
    server.engine.wait_for(submitted(server.engine, count))
    server.engine.allow(steps)
    if stream and steps:
        assert connection.recv(10)
    connection.close()
    server.engine.wait_for(lambda: sorted(server.engine.aborted) == sorted(server.engine.submitted))
    server.until(lambda: server.metrics()[ABORTED] == 1)
    assert server.daemon.service.admission.used == 0
    server.engine.allow(100)
    assert server.complete(max_tokens=2).status_code == 200


def test_a_stop_string_aborts_the_sequence_in_the_engine(start: Start) -> None:
    server = start(Script(answer=b"a.bcdefgh", held=True))
    waiting = background(server, stop=".")
    server.engine.allow(2)
    assert waiting.result().json()["choices"][0]["text"] == "a"
    server.engine.wait_for(lambda: server.engine.aborted == list(server.engine.submitted))


@pytest.mark.parametrize("body", [{"n": 9}, {"prompt": ["a"] * 9}, {"prompt": ["a"] * 3, "n": 3}])
@pytest.mark.parametrize("stream", [False, True])
def test_more_sequences_than_there_is_room_for_are_refused(
    server: Server, body: dict[str, object], stream: bool
) -> None:
    response = server.complete(stream=stream, **body)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert response.headers["x-should-retry"] == "false"


def test_a_full_queue_refuses_with_retry_after_and_frees_up_again(start: Start) -> None:
    server = start(Script(held=True))
    waiting = [background(server, n=4, max_tokens=1) for _ in range(2)]
    server.engine.wait_for(submitted(server.engine, 8))
    refused = server.complete()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert int(refused.headers["retry-after"]) > 0
    assert server.metrics()['expertd_requests_rejected_total{reason="queue_full"}'] == 1
    server.engine.allow(10)
    assert [w.result().status_code for w in waiting] == [200, 200]
    assert server.complete(max_tokens=1).status_code == 200


def test_engine_death_before_the_first_byte_is_503(start: Start) -> None:
    server = start(Script(held=True))
    waiting = [background(server, stream=stream, n=2) for stream in (False, True, False, True)]
    server.engine.wait_for(submitted(server.engine, 8))
    server.engine.crash()
    for future in waiting:
        response = future.result(timeout=2)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
    assert server.metrics()[FAILED] == 4


def test_engine_death_in_a_stream_is_an_error_event_before_done(start: Start) -> None:
    server = start(Script(held=True))
    server.engine.allow(1)
    with server.http.stream("POST", "/v1/completions", json={"prompt": "Hi", "stream": True}) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]
        server.engine.crash()
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert json.loads(rest[-2])["error"]["code"] == "engine_dead"
    assert rest[-1] == "[DONE]"


def test_a_dead_engine_is_replaced_and_counters_do_not_fall(start: Start) -> None:
    server = start()
    server.complete(max_tokens=5)
    lookups = 'expertd_expert_lookups_total{layer="0",result="hit",tier="host"}'
    server.until(lambda: server.metrics()[lookups] == 5)
    server.engine.crash()
    server.launcher.wait_for_engine(2)
    server.until_ready()
    assert server.metrics()[lookups] == 5
    assert server.metrics()['expertd_engine_restarts_total{reason="exit"}'] == 1
    server.complete(max_tokens=3)
    server.until(lambda: server.metrics()[lookups] == 8)
    assert server.metrics()['expertd_swap_transfer_seconds_count{from_tier="disk",to_tier="host"}'] == 8


def test_an_engine_that_keeps_dying_ends_the_server(start: Start) -> None:
    server = start()
    server.script.start_error = Fatal(4, "no memory left")
    server.engine.crash()
    server.join()
    assert isinstance(server.error, EngineError)
    assert "no memory left" in str(server.error)
    assert len(server.launcher.engines) == 1 + 2


def test_a_wedged_engine_is_killed_and_replaced(start: Start) -> None:
    server = start(Script(held=True))
    server.on_loop(lambda: setattr(server.daemon.supervisor, "_heartbeat_s", 0.0))
    waiting = background(server)
    server.engine.wait_for(submitted(server.engine, 1))
    server.engine.mute()
    assert waiting.result().json()["error"]["code"] == "engine_dead"
    server.on_loop(lambda: setattr(server.daemon.supervisor, "_heartbeat_s", 30.0))
    server.launcher.wait_for_engine(2)
    server.until_ready()
    assert server.metrics()['expertd_engine_restarts_total{reason="wedged"}'] == 1
    told = server.http.get("/status").json()["engine"]
    assert (told["restarts"], told["last_failure"]["reason"]) == (1, "wedged")
    assert told["last_failure"]["ago_s"] >= 0
    assert f"engine    restarts: 1; {told['last_failure']['ago_s']:.0f} s ago the last one" in "\n".join(
        shown(server.http.get("/status").json() | {"engine": told}, 0.0, None)
    )


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_engine_ends_the_request_and_not_the_server(start: Start, stream: bool) -> None:
    server = start(Script(held=True))
    waiting = background(server, stream=stream)
    server.engine.wait_for(submitted(server.engine, 1))
    server.engine.fail_sequences("/secret/experts.bin, layer 1, expert 2, cannot be read")
    response = waiting.result()
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")
    assert "secret" not in response.text
    server.engine.allow(100)
    assert server.complete().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_finds_impossible_is_the_clients_to_mend(start: Start, stream: bool) -> None:
    server = start(Script(held=True))
    waiting = background(server, stream=stream)
    server.engine.wait_for(submitted(server.engine, 1))
    server.engine.fail_sequences("no token may come next", refused=True)
    response = waiting.result()
    assert (response.status_code, response.json()["error"]["message"]) == (400, "no token may come next")


def test_what_fails_at_start_ends_the_server_with_the_engines_code(start: Start) -> None:
    server = start(Script(start_error=Fatal(4, "a budget of 1 byte is too small")), ready=False)
    server.launcher.store_ready.set()
    server.join()
    assert isinstance(server.error, ChildFailed)
    assert (server.error.exit_code, str(server.error)) == (4, "a budget of 1 byte is too small")


def test_an_engine_of_another_protocol_is_refused(start: Start) -> None:
    server = start(Script(info=engine_info(protocol=999)), ready=False)
    server.launcher.store_ready.set()
    server.join()
    assert isinstance(server.error, ExpertdError)
    assert "protocol 999" in str(server.error)


def test_a_slow_reader_is_cut_off(start: Start) -> None:
    server = start(Script(held=True))
    server.on_loop(lambda: setattr(server.daemon.service.engine, "_max_buffered_tokens", 3))
    connection = send(server, stream=True, n=4, max_tokens=50)
    server.engine.wait_for(submitted(server.engine, 4))
    server.engine.allow(5)  # four tokens in one frame: more than may wait
    server.engine.wait_for(lambda: len(server.engine.aborted) == 4)
    with connection, connection.makefile("rb") as answer:
        assert any(b"slow_reader" in line for line in iter(lambda: answer.read1(4096), b""))


def test_draining_finishes_what_runs_and_refuses_the_rest(start: Start) -> None:
    server = start(Script(held=True))
    waiting = [background(server, max_tokens=3, stream=stream) for stream in (False, True)]
    server.engine.wait_for(submitted(server.engine, 2))
    server.signal()
    server.until(lambda: httpx.get(server.url + "/ready").json()["status"] == "draining")
    refused = server.complete()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["connection"] == "close"
    assert int(refused.headers["retry-after"]) > 0
    assert httpx.get(server.url + "/live").status_code == 200
    server.engine.allow(10)
    assert waiting[0].result().json()["choices"][0]["finish_reason"] == "length"
    assert waiting[1].result().text.endswith("data: [DONE]\n\n")
    server.join()
    assert server.code == 0
    assert server.engine.shut_down


def test_sixteen_streams_finish_while_the_server_drains(start: Start) -> None:
    server = start(Script(held=True), max_sequences=16, drain_timeout_s=60.0)
    streams = [background(server, max_tokens=4, stream=True, seed=seed) for seed in range(16)]
    server.engine.wait_for(submitted(server.engine, 16))
    server.engine.allow(1)
    server.signal()
    server.until(lambda: httpx.get(server.url + "/ready").json()["status"] == "draining")
    server.engine.allow(10)
    texts = [stream.result().text for stream in streams]
    assert all(text.count('"finish_reason":"length"') == 1 and text.endswith("data: [DONE]\n\n") for text in texts)
    server.join()
    assert server.code == 0


def test_what_outlives_the_drain_time_gets_an_error_event(start: Start) -> None:
    server = start(Script(held=True), drain_timeout_s=0.05)
    server.engine.allow(1)
    with httpx.stream("POST", server.url + "/v1/completions", json={"prompt": "Hi", "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.signal()
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert json.loads(rest[-2])["error"]["code"] == "draining"
    assert rest[-1] == "[DONE]"
    server.join()
    assert server.code == 0


def test_a_second_signal_ends_the_server_at_once(start: Start) -> None:
    server = start(Script(held=True), drain_timeout_s=1000.0)
    connection = send(server, stream=True)
    server.engine.wait_for(submitted(server.engine, 1))
    server.signal()
    server.signal()
    server.join()
    assert server.code == 128 + 15
    assert server.engine.returncode is not None
    connection.close()


def test_a_signal_while_loading_ends_the_server(start: Start) -> None:
    server = start(ready=False)
    server.signal()
    server.launcher.store_ready.set()
    server.join()
    assert server.code == 0
