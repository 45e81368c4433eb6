"""Hostile and edge inputs by the number of their row in the project's list. Every row is here or named where it is.

Whatever is sent, the server answers the next request, and its engine was not restarted: the fixtures see to that.
"""

from __future__ import annotations

import json
import re
import resource
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from expertd_engine.config import Size
from expertd_server import body, connections
from support.fake_engine import WAIT_S, FakeEngine, Script
from support.fake_store import MAX_MODEL_LEN, ids_of
from support.running_server import Server, Start

ROWS = {
    1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 18, 19, 20, 22, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 37, 39,
    40, 41, 43, 44, 45, 47, 49, 50, 51, 52, 53, 54, 55, 56, 57, 59, 61, 62, 63, 65, 66, 67,
}  # fmt: skip

ELSEWHERE = {
    "test_a_known_field_with_a_bad_value_is_refused_by_name": {1, 2, 4, 5, 6, 8, 16, 18, 22, 26, 27, 29, 45, 63},
    "test_what_is_not_json_is_400": {27, 39, 44, 49},
    "test_echo_with_no_tokens_returns_the_prompt_and_its_logprobs": {7},
    "test_max_tokens_defaults_to_16_and_is_cut_to_the_window": {9},
    "test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers": {11},
    "test_a_prompt_that_leaves_room_for_one_token_is_served": {11},
    "test_echo_and_logprobs_cover_prompt_and_answer": {14},
    "test_logprobs_that_json_cannot_hold_become_a_number_that_it_can": {15},
    "test_a_stop_string_over_several_tokens_never_shows": {24},
    "test_text_held_for_a_stop_that_never_completes_is_flushed": {24},
    "test_a_stop_inside_the_echoed_prompt_does_not_count": {25},
    "test_greedy_choices_are_identical": {28},
    "test_the_official_client_gets_a_stream_with_usage": {31},
    "test_engine_death_before_the_first_byte_is_503": {33, 34},
    "test_engine_death_in_a_stream_is_an_error_event_before_done": {33},
    "test_a_client_that_leaves_has_its_sequences_aborted": {37},
    "test_an_unfinished_character_becomes_one_replacement_at_the_end": {40},
    "test_characters_spread_over_tokens_arrive_whole": {41},
    "test_special_tokens_written_in_a_prompt_are_the_tokens": {44},
    "test_a_nul_in_a_prompt_is_a_character": {44},
    "test_every_route_but_the_public_ones_is_closed_however_it_is_spelt": {51},
    "test_cors_is_off_by_default": {52},
    "test_row_53_bad_values_are_400_by_name": {53},
    "test_an_unknown_model_is_404": {54},
    "test_more_sequences_than_there_is_room_for_are_refused": {59},
    "test_a_full_queue_refuses_with_retry_after_and_frees_up_again": {59},
    "test_draining_finishes_what_runs_and_refuses_the_rest": {61},
    "test_a_second_signal_ends_the_server_at_once": {61},
    "test_a_message_that_is_none_is_refused_by_its_place": {55},
    "test_a_template_refuses_in_its_own_words": {55},
    "test_tools_that_make_no_sense_are_refused": {56},
    "test_what_takes_too_long_is_given_up_and_the_next_is_checked": {20},
    "test_a_stream_goes_on_while_a_grammar_is_checked": {20},
    "test_budget_policy_and_prefetch_change_no_bit": {66},
    "test_a_sequence_is_the_same_alone_and_in_any_batch": {66},
    "test_a_budget_that_shrinks_while_requests_run_ends_none_of_them": {67},
}
"""Tests in other files, and the rows that they are."""

TESTED: dict[int, list[str]] = defaultdict(list)
Test = TypeVar("Test", bound=Callable[..., None])


def row(number: int) -> Callable[[Test], Test]:
    """This test is of that row."""

    def register(test: Test) -> Test:
        TESTED[number].append(test.__name__)
        return test

    return register


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def text_of(response: httpx.Response) -> str:
    """The first choice's text, streamed or not."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        return str(response.json()["choices"][0]["text"])
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


@both
@row(12)
def test_row_12_a_prompt_over_the_window_is_the_same_400_while_others_run(start: Start, stream: bool) -> None:
    server = start(Script(held=True))
    server.engine.allow(1)
    with server.http.stream("POST", "/v1/completions", json={"prompt": "a", "n": 4, "stream": True}) as running:
        next(running.iter_lines())
        refused = [server.complete(prompt=p, stream=stream) for p in ("a" * (MAX_MODEL_LEN + 1), [1] * 1000)]
    for response in refused:
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


@both
@row(13)
def test_row_13_logprobs_of_a_prompt_do_not_depend_on_sampling(server: Server, stream: bool) -> None:
    asked = {"prompt": ids_of("abc"), "echo": True, "logprobs": 2, "max_tokens": 0, "stream": stream}
    answers = [server.complete(**asked, **how).text for how in ({"top_k": 1}, {"temperature": 1}, {"temperature": 0})]
    assert len({re.search(r'"token_logprobs":\[[^]]*\]', answer.replace(" ", ""))[0] for answer in answers}) == 1  # type: ignore[index]  # a missing one fails the test as it should


@row(30)
@pytest.mark.parametrize(
    ("options", "stream", "status"),
    [({}, False, 400), ({"include_usage": True}, False, 400), (None, False, 200), (None, True, 200), ({}, True, 200),
     ({"new": 1, "include_usage": None}, True, 200), ("yes", True, 400), ([], True, 400),
     ({"include_usage": 1}, True, 400)],
)  # fmt: skip
def test_row_30_stream_options(server: Server, options: object, stream: bool, status: int) -> None:
    response = server.complete(stream=stream, stream_options=options)
    assert response.status_code == status
    assert '"prompt_tokens"' not in response.text or not stream, "nobody asked for usage"


@row(32)
def test_row_32_every_choice_ends_in_one_chunk_with_text_and_a_reason(server: Server) -> None:
    answer = server.complete(prompt=["a", "b"], n=2, stream=True, max_tokens=3).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in answer.split("\n\n") if line and "[DONE]" not in line]
    for index in range(4):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]
        assert all("text" in c for c in own)


@both
@row(43)
@pytest.mark.parametrize("noise", [b"\xff\xfe\x80" * 5, b"\xf0\x9f\xf0\x9f", b"\xe6\x97", bytes(range(128, 168))])
def test_row_43_bytes_that_are_no_text_do_not_stop_the_stream(server: Server, noise: bytes, stream: bool) -> None:
    server.script.answer = noise + b" and on"
    assert text_of(server.complete(stream=stream, max_tokens=MAX_MODEL_LEN)).endswith(" and on")


@both
@row(47)
def test_row_47_27_mb_of_prompt_are_refused_by_their_characters(start: Start, stream: bool) -> None:
    server = start(max_body=Size(bytes=32 * 2**20))
    response = server.complete(prompt="a" * 27_000_000, stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert server.complete(stream=stream).status_code == 200


@row(49)
@pytest.mark.parametrize("content", [b"[" * 10_000_000, b'{"a":' * 100_000, b'{"prompt": "a", "user": ' + b"[" * 10**6])
def test_row_49_nesting_without_end(start: Start, content: bytes) -> None:
    server = start(max_body=Size(bytes=16 * 2**20))
    response = server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    assert server.complete().status_code == 200


# ---------------------------------------------------------------- forms and conversations

DEEP: Any = {}
for _ in range(400):
    DEEP = {"type": "array", "items": DEEP}
GRAMMARS: list[tuple[int, dict[str, Any]]] = [
    (19, {"regex": "(a"}), (19, {"regex": "[z-a]"}), (19, {"json": {"type": "no such type"}}), (19, {"json": 5}),
    (19, {"json": {"$ref": "#/nowhere"}}), (19, {"grammar": "start: ("}), (19, {"choice": []}),
    (20, {"regex": "(" * 30_000}), (20, {"regex": "*a"}), (20, {"regex": "(" * 30_000 + "a" + ")" * 30_000}),
    (20, {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000}), (20, {"json": DEEP}),
]  # fmt: skip


@both
@row(19)
@row(20)
@pytest.mark.parametrize(
    "form", [pytest.param(form, id=f"row-{number}-{i}") for i, (number, form) in enumerate(GRAMMARS)]
)
def test_a_form_that_cannot_be_is_400(server: Server, form: dict[str, Any], stream: bool) -> None:
    content = json.dumps({"prompt": "a", "stream": stream, "structured_outputs": form})
    response = server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert len(response.content) < 4000
    assert not server.engine.submitted or last_submitted(server.engine).sampling.constraint is None


@both
@row(57)
@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://127.0.0.1:{port}/trap", "data:image/png;base64,AAAA"])
def test_row_57_nothing_that_a_message_points_to_is_opened(server: Server, url: str, stream: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        part = {"type": "image_url", "image_url": {"url": url.format(port=trap.getsockname()[1])}}
        body = {"messages": [{"role": "user", "content": [part]}], "stream": stream}
        response = server.http.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
        assert "root:" not in response.text
        with pytest.raises(BlockingIOError):
            trap.accept()


# ---------------------------------------------------------------- connections


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """500 connections have 1000 ends in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"only {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(server: Server, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    connection.sendall(sent)
    return connection


@row(50)
@pytest.mark.usefixtures("many_descriptors")
def test_row_50_500_idle_connections_stop_nobody(server: Server) -> None:
    beginnings = [b"", b"GET /live HTTP/1.1\r\nhost: x\r\nx-slow: ", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
                  b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"]  # fmt: skip
    with ExitStack() as stack:
        for i in range(500):
            stack.enter_context(connect(server, beginnings[i % 3]))
        assert httpx.get(server.url + "/live").status_code == 200
        assert server.complete().status_code == 200


@row(50)
@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /live HTTP/1.1\r\nx: ", b"GET /live HTTP/1.1\r\nhost: x\r\n\r\nGET /l"],
    ids=["", "head", "second"],
)
def test_row_50_a_head_that_never_ends_is_cut_off(start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    server = start()
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.1)
    with connect(server, sent) as connection, connection.makefile("rb") as answer:
        received = answer.read()
    assert received.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


@row(50)
def test_row_50_a_head_without_bound_is_cut_off(server: Server) -> None:
    with connect(server, b"GET /live HTTP/1.1\r\nx: ") as connection, pytest.raises(ConnectionError):
        while True:
            connection.sendall(b"a" * 65536)


@row(50)
def test_row_50_a_body_that_stalls_is_400(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    monkeypatch.setattr(body, "READ_TIMEOUT_S", 0.05)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    with connect(server, head) as connection, connection.makefile("rb") as answer:
        assert answer.readline() == b"HTTP/1.1 400 Bad Request\r\n"
        assert any(b'"timeout"' in line for line in iter(lambda: answer.read1(4096), b""))
    assert server.complete().status_code == 200


# ---------------------------------------------------------------- states and private fields


@both
@row(62)
def test_row_62_while_loading_every_inference_route_says_so(start: Start, stream: bool) -> None:
    server = start(ready=False)
    paths = server.http.get("/openapi.json").json()["paths"]
    posts = [path for path, methods in paths.items() if "post" in methods]
    assert "/v1/completions" in posts and "/tokenize" in posts
    for path in posts:
        response = server.http.post(path, json={"prompt": "a", "stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_loading"), path
        assert int(response.headers["retry-after"]) > 0


@both
@row(65)
def test_row_65_what_is_private_to_the_engine_cannot_be_set(server: Server, stream: bool) -> None:
    private: dict[str, Any] = {
        "sequence_id": -1, "choice_index": 2**70, "arrival_s": -1e300, "id_slot": -2, "n_keep": 2**63, "mode": "none",
        "inputs": [], "sampling": {"max_tokens": 10**9}, "block_table": [0],
    }  # fmt: skip
    assert server.complete(stream=stream, max_tokens=1, **private).status_code == 200
    sent = last_submitted(server.engine)
    assert sent.sequence_id > 0 and sent.choice_index == 0 and sent.mode == "exact"
    assert (sent.sampling.max_tokens, sent.inputs[0].token_ids) == (1, ids_of("Hi"))
    assert server.complete(priority=2**31, stream=stream).status_code == 400


def last_submitted(engine: FakeEngine) -> Any:
    return list(engine.submitted.values())[-1]


def test_every_row_has_its_test() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [name for name in ELSEWHERE if f"def {name}(" not in sources] == []
    assert set().union(TESTED, *ELSEWHERE.values()) == ROWS
