"""Fields beyond OpenAI's that other servers made common."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from support.fake_store import BYTE_IDS, END, MAX_MODEL_LEN, VOCAB_SIZE, ids_of
from support.running_server import Server

both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def choices(response: httpx.Response) -> list[Any]:
    """The first choice, whole or in its chunks."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [response.json()["choices"][0]]
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(event)["choices"][0] for event in events[:-1]]


def text(response: httpx.Response) -> str:
    return "".join(choice["text"] for choice in choices(response))


@both
def test_a_stop_string_may_be_part_of_the_text(server: Server, stream: bool) -> None:
    server.script.answer = b"one STOP two"
    answer = server.complete(stop=["STOP"], include_stop_str_in_output=True, stream=stream)
    assert text(answer) == "one STOP"
    assert choices(answer)[-1]["stop_reason"] == "STOP"


@both
def test_special_tokens_may_be_part_of_the_text(server: Server, stream: bool) -> None:
    server.script.answer = [*ids_of("a"), END, *ids_of("b")]
    asked = {"ignore_eos": True, "max_tokens": 3, "stream": stream}
    assert text(server.complete(**asked)) == "ab"
    assert text(server.complete(**asked, skip_special_tokens=False)) == "a<|endoftext|>b"


def test_the_token_that_ends_an_answer_is_text_only_if_asked_for(server: Server) -> None:
    server.script.answer = b"abc"
    stop = {"stop_token_ids": [BYTE_IDS[ord("c")]]}
    assert text(server.complete(**stop)) == "ab"
    assert text(server.complete(**stop, include_stop_str_in_output=True)) == "abc"
    assert text(server.complete(skip_special_tokens=False)) == "abc"
    assert text(server.complete(skip_special_tokens=False, include_stop_str_in_output=True)) == "abc<|endoftext|>"


@both
def test_token_ids_come_with_their_text(server: Server, stream: bool) -> None:
    server.script.answer = "é!".encode()
    parts = choices(server.complete(prompt="ab", return_token_ids=True, stream=stream))
    assert [i for part in parts for i in part["token_ids"]] == [*ids_of("é!"), END]
    assert [part["prompt_token_ids"] for part in parts] == [ids_of("ab")] + [None] * (len(parts) - 1)
    assert all(part["token_ids"] is None for part in choices(server.complete(stream=stream)))


def test_logprobs_may_name_tokens_by_id(server: Server) -> None:
    server.script.answer = b"x"
    logprobs = choices(server.complete(prompt="a", echo=True, logprobs=1, return_tokens_as_token_ids=True))[0][
        "logprobs"
    ]
    assert logprobs["tokens"] == [f"token_id:{i}" for i in (*ids_of("ax"), END)]
    assert all(name.startswith("token_id:") for top in logprobs["top_logprobs"][1:] for name in top)


@pytest.mark.parametrize("prompt", ["0123456789", ids_of("0123456789")], ids=["text", "ids"])
def test_a_prompt_may_be_cut_to_its_last_tokens(server: Server, prompt: object) -> None:
    body = server.complete(prompt=prompt, truncate_prompt_tokens=4, echo=True, max_tokens=0).json()
    assert (body["choices"][0]["text"], body["usage"]["prompt_tokens"]) == ("6789", 4)
    assert server.complete(prompt=prompt, truncate_prompt_tokens=100).json()["usage"]["prompt_tokens"] == 10


@pytest.mark.parametrize("prompt", ["a" * 500, [1] * 500], ids=["text", "ids"])
def test_a_prompt_may_be_cut_to_what_fits(server: Server, prompt: object) -> None:
    usage = server.complete(prompt=prompt, truncate_prompt_tokens=-1, max_tokens=10).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (MAX_MODEL_LEN - 10, 10)


def test_the_engine_hears_of_tokens_and_words(server: Server) -> None:
    server.complete(allowed_token_ids=[1, 2], bad_words=["ab", " c"], cache_salt="mine")
    sent = list(server.engine.submitted.values())[-1]
    assert sent.sampling.allowed_token_ids == [1, 2]
    assert sent.sampling.bad_words == [ids_of("ab"), ids_of(" ab"), ids_of("c"), ids_of(" c")]
    assert sent.cache_salt == "mine"


@both
@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("allowed_token_ids", []), ("allowed_token_ids", [VOCAB_SIZE]), ("allowed_token_ids", [-1]),
        ("allowed_token_ids", ["1"]), ("allowed_token_ids", 1), ("bad_words", [""]), ("bad_words", "word"),
        ("bad_words", ["a"] * 300), ("bad_words", [1]), ("include_stop_str_in_output", "yes"),
        ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2), ("truncate_prompt_tokens", "5"),
        ("cache_salt", "x" * 129), ("cache_salt", "a/b"), ("cache_salt", "a@b"), ("cache_salt", "a\0b"),
        ("cache_salt", 5), ("skip_special_tokens", 1), ("add_special_tokens", "no"), ("return_token_ids", 1),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_bad_values_are_refused_by_name(server: Server, param: str, value: object, stream: bool) -> None:
    response = server.complete(stream=stream, **{param: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_request_that_leaves_no_token_is_refused(server: Server) -> None:
    for barred in (
        {"bad_words": ["a"], "allowed_token_ids": ids_of("a")},
        {"min_tokens": 1, "allowed_token_ids": [END]},
    ):
        response = server.complete(**barred)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "allowed_token_ids")
    assert server.complete(min_tokens=1, allowed_token_ids=[END], ignore_eos=True).status_code == 200
