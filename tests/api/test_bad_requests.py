"""Inputs that are wrong, hostile or at an edge: an OpenAI error body, a status, and a server that goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from expertd_server import generation
from support.fake_store import MAX_MODEL_LEN, MODEL_NAME, VOCAB_SIZE
from support.running_server import Server


def check_error(response: httpx.Response, status: int, code: str | None = None, param: str | None = None) -> Any:
    """The error object, after checking its form."""
    error = response.json()["error"]
    assert response.status_code == status, error
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert len(response.content) < 4000
    assert response.headers["x-request-id"]
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    return error


BAD_VALUES = [
    ("logit_bias", {str(VOCAB_SIZE): 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"a": 1}),
    ("logit_bias", {"042": 1, "42": -1}),
    ("logit_bias", {"1": None}), ("logit_bias", {"1": "1"}), ("logit_bias", {"1": 1e9}),
    ("logit_bias", {str(i): 1 for i in range(1025)}), ("logit_bias", []),
    ("prompt", [VOCAB_SIZE]), ("prompt", [200000]), ("prompt", [-1]), ("prompt", [2**63]),
    ("prompt", ""), ("prompt", [""]), ("prompt", []), ("prompt", [[]]), ("prompt", None), ("prompt", [[1], []]),
    ("prompt", [1, "a"]), ("prompt", [1.0]), ("prompt", [True]), ("prompt", [[1], "a"]), ("prompt", [[True]]),
    ("prompt", {"a": 1}), ("prompt", 5), ("prompt", ["a"] * 1025), ("prompt", [None]),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "5"), ("max_tokens", 2.0), ("max_tokens", 2**40),
    ("logprobs", 1000000), ("logprobs", 21), ("logprobs", -5), ("logprobs", True), ("logprobs", "5"), ("logprobs", 2.5),
    ("seed", 2**64), ("seed", -(2**63) - 1), ("seed", "1"), ("seed", 10**39),
    ("temperature", -1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True),
    ("best_of", 5), ("suffix", "end"), ("stream_options", {}), ("expert_mode", "fast"), ("max_substituted_mass", 1.5),
    ("guided_json", {}), ("response_format", {"type": "json"}), ("response_format", {"type": "json_schema"}),
    ("response_format", "json_object"), ("grammar", "x"), ("structured_outputs", {}),
    ("structured_outputs", {"regex": "a", "choice": ["b"]}), ("structured_outputs", {"json": "{"}),
    ("structured_outputs", {"json": '{"const": "\\ud800"}'}),
    ("min_tokens", 17), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 2), ("repetition_penalty", 5e-324),
    ("presence_penalty", 3), ("frequency_penalty", -2.5), ("n", 0), ("n", 129), ("n", True),
    ("stop", [""]), ("stop", ""), ("stop", ["a"] * 5), ("stop", [1]), ("stop", "x" * 2000),
    ("stop_token_ids", [VOCAB_SIZE]), ("stop_token_ids", [-1]), ("ignore_eos", "yes"), ("echo", 1),
    ("priority", 2**40), ("user", 5), ("model", 5),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("param", "value"), BAD_VALUES, ids=lambda value: repr(value)[:40])
def test_a_known_field_with_a_bad_value_is_refused_by_name(
    server: Server, param: str, value: object, stream: bool
) -> None:
    body = {"stream": stream} if stream and param != "stream_options" else {}
    assert check_error(server.complete(**body, **{param: value}), 400)["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"text"', b"5", b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "top_p": 1e400}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b"[" * 90_000, b'{"a":' * 15_000, b'{"prompt": "\xff"}',
        '{"prompt": "你"}'.encode("gbk"), '{"prompt": "a"}'.encode("utf-16"), b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\ud800 and more text"}', b"\x1f\x8b\x08",
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_what_is_not_json_is_400(server: Server, body: bytes) -> None:
    response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert check_error(response, 400)["code"] == "invalid_json"


def test_a_byte_order_mark_is_fine(server: Server) -> None:
    body = b"\xef\xbb\xbf" + json.dumps({"prompt": "a"}).encode()
    response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_415_and_not_echoed(server: Server, content_type: str) -> None:
    response = server.http.post("/v1/completions", content=b"prompt=hidden", headers={"content-type": content_type})
    assert "hidden" not in check_error(response, 415, "unsupported_media_type")["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413_also_when_chunked(server: Server, chunked: bool) -> None:
    body = b'{"prompt": "' + b"a" * 200_000 + b'"}'
    content = iter([body[:100], body[100:]]) if chunked else body
    with httpx.Client(base_url=server.url) as http:
        response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert check_error(response, 413)["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("POST", "/v1/completions/", 404), ("GET", "/v1/completions", 405),
     ("POST", "/health", 405), ("DELETE", "/v1/models", 405)],
)  # fmt: skip
def test_routes_and_methods_that_do_not_exist_have_our_body(
    server: Server, method: str, path: str, status: int
) -> None:
    response = server.http.request(method, path)
    check_error(response, status)
    if status == 405:
        assert response.headers["allow"] in ("GET", "POST")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a" * MAX_MODEL_LEN, "a" * (MAX_MODEL_LEN + 1), "a" * 90_000, [1] * 1000])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(
    server: Server, prompt: object, stream: bool
) -> None:
    error = check_error(server.complete(prompt=prompt, stream=stream), 400, "context_length_exceeded", "prompt")
    assert error["n_ctx"] == MAX_MODEL_LEN
    assert error["n_prompt_tokens"] >= MAX_MODEL_LEN
    assert str(MAX_MODEL_LEN) in error["message"]


def test_a_prompt_that_leaves_room_for_one_token_is_served(server: Server) -> None:
    assert server.complete(prompt="a" * (MAX_MODEL_LEN - 1)).json()["usage"]["completion_tokens"] == 1
    assert server.complete(prompt="a" * MAX_MODEL_LEN, echo=True, max_tokens=0).status_code == 200


def test_far_too_many_choices_are_refused_before_any_is_planned(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "plan_sequences", None)
    response = server.complete(prompt=["a"] * 1024, n=128)
    check_error(response, 503, "server_is_overloaded")
    assert response.headers["x-should-retry"] == "false"
    monkeypatch.undo()


@pytest.mark.parametrize("model", ["other", "test", "test/tiny/"])
def test_an_unknown_model_is_404(server: Server, model: str) -> None:
    check_error(server.complete(model=model), 404, "model_not_found", "model")
    assert server.http.get(f"/v1/models/{model}").status_code == 404


@pytest.mark.parametrize("model", ["", MODEL_NAME, "demo"])
def test_the_model_served_may_be_named_or_not(server: Server, model: str) -> None:
    assert server.complete(model=model).status_code == 200


@pytest.mark.parametrize(("field", "value", "told"), [
    ("stop", ["a"] * 5, "at most 4 items"), ("structured_outputs", {"json": False}, "structured_outputs.json: "),
])  # fmt: skip
def test_of_several_forms_the_one_that_came_nearest_is_told(
    server: Server, field: str, value: object, told: str
) -> None:
    assert told in check_error(server.complete(**{field: value}), 400)["message"]


def test_a_long_value_is_clipped_in_the_message(server: Server) -> None:
    error = check_error(server.complete(temperature="x" * 50_000), 400, param="temperature")
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("given", "answered"), [("abc-1.2:3_4", "abc-1.2:3_4"), ("a b\tc/é", "abc"), ("x" * 1000, "x" * 128)]
)
def test_a_request_id_is_sanitised_and_echoed(server: Server, given: str, answered: str) -> None:
    response = server.http.get("/live", headers={b"x-request-id": given.encode()})
    assert response.headers["x-request-id"] == answered


def test_requests_without_an_id_get_different_ones(server: Server) -> None:
    assert len({server.http.get("/live").headers["x-request-id"] for _ in range(3)}) == 3
    assert int(server.complete().headers["openai-processing-ms"]) >= 0
