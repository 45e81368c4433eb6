"""POST /v1/completions through the official client and by hand: shapes, forms of prompt, streams, logprobs, stops."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from support.fake_store import BYTE_IDS, MODEL_NAME, ids_of
from support.running_server import Server
from support.streams import events


def test_the_official_client_gets_a_whole_answer(client: openai.OpenAI, server: Server) -> None:
    server.script.answer = b" Paris"
    answer = client.completions.create(model=MODEL_NAME, prompt="The capital is", max_tokens=16)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == MODEL_NAME
    assert answer.choices[0].text == " Paris"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (14, 7, 21)
    assert answer.system_fingerprint is not None
    assert answer._request_id


def test_the_official_client_gets_a_stream_with_usage(client: openai.OpenAI, server: Server) -> None:
    """Not strict here: the client's own type forbids the null `finish_reason` of every chunk but the last."""
    server.script.answer = b" Paris"
    client._strict_response_validation = False
    stream = client.completions.create(
        model=MODEL_NAME, prompt="Hi", stream=True, stream_options={"include_usage": True}, logprobs=1
    )
    chunks = list(stream)
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert "".join(c.choices[0].text for c in chunks[:-1]) == " Paris"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 2 + 7


def test_continuous_usage_counts_up_in_every_chunk(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = events(server.complete(max_tokens=3, stream=True, stream_options=options).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in got] == [1, 2, 3, 3]


def test_stream_options_without_wishes_bring_no_usage(server: Server) -> None:
    got = events(server.complete(max_tokens=2, stream=True, stream_options={"include_obfuscation": False}).text)
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in got)


def test_a_stream_has_the_headers_that_proxies_need(server: Server) -> None:
    headers = server.complete(stream=True).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"], ids_of("Hi"), [ids_of("Hi")]])
def test_all_forms_of_a_prompt_mean_the_same(server: Server, prompt: object) -> None:
    body = server.complete(prompt=prompt, temperature=0, max_tokens=4, echo=True).json()
    assert (
        body["choices"][0]["text"] == "Hi" + server.complete(temperature=0, max_tokens=4).json()["choices"][0]["text"]
    )


@pytest.mark.parametrize("prompts", [["one", "three"], [ids_of("one"), ids_of("three")]])
def test_choice_j_of_prompt_i_has_index_i_n_plus_j(server: Server, prompts: object) -> None:
    body = server.complete(prompt=prompts, n=2, echo=True, max_tokens=3).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [c["text"][:-3] for c in body["choices"]] == ["one", "one", "three", "three"]
    assert body["usage"] == {
        "prompt_tokens": 8, "completion_tokens": 12, "total_tokens": 20, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


def test_cached_tokens_count_once_for_each_prompt(server: Server) -> None:
    server.script.cached_tokens = 2
    for body in (
        server.complete(prompt=["one", "three"], n=2).json(),
        events(server.complete(prompt=["one", "three"], n=2, stream=True, stream_options={"include_usage": True}).text)[
            -1
        ],
    ):
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_choices_differ_by_seed_and_index_and_repeat(server: Server) -> None:
    texts = [[c["text"] for c in server.complete(n=2, seed=7).json()["choices"]] for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_greedy_choices_are_identical(server: Server) -> None:
    choices = server.complete(n=3, temperature=0).json()["choices"]
    assert len({c["text"] for c in choices}) == 1


def test_streamed_choices_end_once_each_and_carry_their_echo_first(server: Server) -> None:
    got = events(server.complete(prompt=["ab", "cd"], n=2, stream=True, echo=True, max_tokens=2).text)
    texts = {i: [c["choices"][0]["text"] for c in got if c["choices"][0]["index"] == i] for i in range(4)}
    assert [texts[i][0][:2] for i in range(4)] == ["ab", "ab", "cd", "cd"]
    ends = [c["choices"][0]["index"] for c in got if c["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]


def test_echo_with_no_tokens_returns_the_prompt_and_its_logprobs(server: Server) -> None:
    body = server.complete(prompt="Hé", echo=True, max_tokens=0, logprobs=1).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], body["usage"]["completion_tokens"]) == ("Hé", "length", 0)
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_logprobs_cover_prompt_and_answer(server: Server, stream: bool) -> None:
    """What lm-eval sums: entries for every prompt token and every generated one, the first without numbers."""
    server.script.answer = b"xy"
    response = server.complete(prompt=ids_of("ab"), echo=True, max_tokens=2, logprobs=2, stream=stream)
    parts = events(response.text) if stream else [response.json()]
    logprobs = [part["choices"][0]["logprobs"] for part in parts]
    joined = {key: [x for part in logprobs for x in part[key]] for key in logprobs[0]}
    assert joined["tokens"] == ["a", "b", "x", "y"]
    assert joined["token_logprobs"] == [None, -1.0, -1.0, -1.0]
    assert joined["text_offset"] == [0, 1, 2, 3]
    assert [len(top) for top in joined["top_logprobs"][1:]] == [3, 3, 3]
    assert joined["top_logprobs"][1]["b"] == -1.0


def test_logprobs_zero_gives_the_chosen_token_alone(server: Server) -> None:
    logprobs = server.complete(logprobs=0, max_tokens=1).json()["choices"][0]["logprobs"]
    assert [list(top.values()) for top in logprobs["top_logprobs"]] == [[-1.0]]


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_logprobs_that_json_cannot_hold_become_a_number_that_it_can(server: Server, value: float) -> None:
    server.script.logprob = value
    body = server.complete(logprobs=1, max_tokens=1, echo=True).json()
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [None, -9999.0, -9999.0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_several_tokens_never_shows(server: Server, stream: bool) -> None:
    server.script.answer = b"one STOP two"
    response = server.complete(stop=[" STOP", "zzz"], stream=stream)
    choices = [e["choices"][0] for e in (events(response.text) if stream else [response.json()])]
    assert "".join(c["text"] for c in choices) == "one"
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", " STOP")
    assert all(not " STOP".startswith(c["text"]) or not c["text"] for c in choices)


def test_text_held_for_a_stop_that_never_completes_is_flushed(server: Server) -> None:
    server.script.answer = b"one STO"
    got = events(server.complete(stop=" STOP", stream=True).text)
    assert "".join(e["choices"][0]["text"] for e in got) == "one STO"
    assert got[-1]["choices"][0]["stop_reason"] is None


def test_a_stop_inside_the_echoed_prompt_does_not_count(server: Server) -> None:
    server.script.answer = b"abc"
    assert server.complete(prompt="X.", stop=".", echo=True).json()["choices"][0]["text"] == "X.abc"


def test_min_tokens_holds_a_stop_string_off(server: Server) -> None:
    server.script.answer = b"..a."
    assert server.complete(stop=".", min_tokens=3).json()["choices"][0]["text"] == "..a"


def test_a_stop_token_ends_the_text_without_being_in_it(server: Server) -> None:
    server.script.answer = b"abc"
    choice = server.complete(stop_token_ids=[BYTE_IDS[ord("c")]]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", BYTE_IDS[ord("c")])


def test_ignore_eos_goes_on_and_special_tokens_are_not_text(server: Server) -> None:
    server.script.answer = b"ab"
    body = server.complete(ignore_eos=True, max_tokens=5).json()
    assert (body["choices"][0]["text"], body["usage"]["completion_tokens"]) == ("ab", 5)
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("text", ["héllo 😀 日本", "👩‍👩‍👧", "\ufffd ok"])
def test_characters_spread_over_tokens_arrive_whole(server: Server, text: str) -> None:
    server.script.answer = text.encode()
    got = events(server.complete(stream=True, max_tokens=40).text)
    pieces = [e["choices"][0]["text"] for e in got]
    assert "".join(pieces) == text == server.complete(max_tokens=40).json()["choices"][0]["text"]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_an_unfinished_character_becomes_one_replacement_at_the_end(server: Server) -> None:
    server.script.answer = "a😀".encode()[:-1]
    assert server.complete().json()["choices"][0]["text"] == "a\ufffd"


def test_max_tokens_defaults_to_16_and_is_cut_to_the_window(server: Server) -> None:
    assert server.complete(max_tokens=None).json()["usage"]["completion_tokens"] == 16
    body = server.complete(prompt="a" * 60, max_tokens=1000).json()
    assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (4, "length")


def test_the_engine_gets_what_was_asked_for(server: Server) -> None:
    asked: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.25, "min_p": 0.125, "presence_penalty": -1, "frequency_penalty": 2,
        "repetition_penalty": 1.5, "seed": -5, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [3],
    }  # fmt: skip
    assert server.complete(**asked, top_k=-1, logit_bias={"7": -100}, priority=3).status_code == 200
    sent = list(server.engine.submitted.values())[-1]
    assert {name: getattr(sent.sampling, name) for name in asked} == asked
    assert (sent.sampling.top_k, sent.sampling.logit_bias, sent.priority, sent.mode) == (0, {7: -100.0}, 3, "exact")


def test_null_means_the_default_everywhere(server: Server) -> None:
    nulls = dict.fromkeys(
        ["temperature", "top_p", "n", "stop", "stream", "stream_options", "logprobs", "seed", "logit_bias", "suffix",
         "best_of", "echo", "user", "presence_penalty", "model", "expert_mode"])  # fmt: skip
    assert server.complete(**nulls).status_code == 200


def test_unknown_fields_are_accepted(server: Server) -> None:
    assert server.complete(made_up={"a": [1]}, cache_prompt=True).status_code == 200


def test_special_tokens_written_in_a_prompt_are_the_tokens(server: Server) -> None:
    assert server.complete(prompt="a<|endoftext|>", echo=True).json()["usage"]["prompt_tokens"] == 2


def test_a_nul_in_a_prompt_is_a_character(server: Server) -> None:
    assert server.complete(prompt="a\0b", echo=True, max_tokens=0).json()["choices"][0]["text"] == "a\0b"
