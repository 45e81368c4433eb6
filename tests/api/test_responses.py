"""POST /v1/responses: a stateless adapter over chat."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from support.fake_engine import Script
from support.fake_numbers import engine_info
from support.running_server import Server, Start
from support.streams import named_events

TOOL: Any = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": None}
CALL = b'<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>'


def ask(server: Server, **body: Any) -> Any:
    return server.http.post("/v1/responses", json={"input": "Hi", **body})


def last(server: Server) -> Any:
    return list(server.engine.submitted.values())[-1]


def prompt(server: Server) -> str:
    codec = server.daemon.service.serving().codec
    return codec.decode_all(last(server).inputs[0].token_ids)


def test_the_official_client_gets_a_whole_response(talking: Server, talking_client: openai.OpenAI) -> None:
    talking.script.answer = b"Paris."
    response = talking_client.responses.create(
        model="", input="Where?", instructions="Be brief.", metadata={"a": "b"}, store=True, temperature=0.5,
        top_p=0.25, max_output_tokens=9,
    )  # fmt: skip
    assert (response.output_text, response.status, response.object) == ("Paris.", "completed", "response")
    assert response.usage is not None
    assert (response.usage.output_tokens, response.metadata) == (7, {"a": "b"})
    assert response.to_dict()["store"] is False
    assert prompt(talking) == "<|system|>Be brief.\n<|user|>Where?\n<|assistant|>"
    sampling = last(talking).sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.25, 9)


def test_the_official_client_gets_a_stream(talking: Server, talking_client: openai.OpenAI) -> None:
    talking.script.answer = b"Paris."
    with talking_client.responses.stream(model="", input="Where?") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == "Paris."
        assert stream.get_final_response().output_text == "Paris."


def test_events_come_in_order_and_numbered(talking: Server) -> None:
    talking.script.answer = b"ab"
    got = named_events(ask(talking, stream=True).text)
    assert [event["type"] for event in got] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in got] == list(range(10))
    assert got[0]["response"]["status"] == "in_progress"
    assert got[0]["response"]["output"] == []
    item = got[-1]["response"]["output"][0]
    assert (item["status"], item["content"][0]["text"]) == ("completed", "ab")
    assert {event["item_id"] for event in got[3:8]} == {item["id"]}
    assert got[-1]["response"]["usage"]["output_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_cut_by_its_limit_is_incomplete(talking: Server, stream: bool) -> None:
    answer = ask(talking, max_output_tokens=2, stream=stream)
    response = named_events(answer.text)[-1]["response"] if stream else answer.json()
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_answer_is_a_message_without_text(talking: Server, stream: bool) -> None:
    talking.script.answer = b""
    answer = ask(talking, stream=stream)
    response = named_events(answer.text)[-1]["response"] if stream else answer.json()
    assert [part["text"] for part in response["output"][0]["content"]] == [""]


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_text_and_calls_are_items(talking: Server, stream: bool) -> None:
    talking.script.answer = b"<think>hm</think>Wait." + CALL
    answer = ask(talking, tools=[TOOL], stream=stream)
    got = named_events(answer.text) if stream else []
    thought, message, call = (got[-1]["response"] if stream else answer.json())["output"]
    assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", "hm")
    assert (message["type"], message["content"][0]["text"]) == ("message", "Wait.")
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", '{"a": 1}')
    if stream:
        pieces = [event["delta"] for event in got if event["type"] == "response.function_call_arguments.delta"]
        assert "".join(pieces) == '{"a": 1}'
        done = [event for event in got if event["type"] == "response.function_call_arguments.done"]
        assert [event["arguments"] for event in done] == ['{"a": 1}']
        assert sum(event["type"] == "response.output_item.done" for event in got) == 3


def test_a_call_goes_round_with_the_official_client(talking: Server, talking_client: openai.OpenAI) -> None:
    talking.script.answer = CALL
    first = talking_client.responses.create(model="", input="Weather?", tools=[TOOL])
    call = first.output[0]
    assert call.type == "function_call"
    talking.script.answer = b"Rain."
    history: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}, call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]  # fmt: skip
    assert talking_client.responses.create(model="", input=history, tools=[TOOL]).output_text == "Rain."
    assert '<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>\n<|tool|>rain' in prompt(talking)


@pytest.mark.parametrize(
    ("choice", "forced"),
    [("auto", False), ("required", True), ({"type": "function", "name": "weather"}, True),
     ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}, True)],
)  # fmt: skip
def test_a_tool_may_have_to_be_called(talking: Server, choice: object, forced: bool) -> None:
    assert ask(talking, tools=[TOOL], tool_choice=choice, max_output_tokens=1).status_code == 200
    assert (last(talking).sampling.constraint is not None) == forced


def test_the_form_of_the_text_reaches_the_engine(talking: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    response = ask(talking, text={"format": form}, max_output_tokens=1)
    assert response.json()["text"] == {"format": form}
    assert json.loads(last(talking).sampling.constraint.text) == schema


def test_reasoning_effort_reaches_the_template(talking: Server) -> None:
    assert ask(talking, reasoning={"effort": "high"}, max_output_tokens=1).status_code == 200
    assert prompt(talking).endswith("high")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("previous_response_id", "resp_1"), ("conversation", "c"), ("background", True), ("prompt", {"id": "x"}),
        ("input", ""), ("input", []), ("input", None), ("input", 5), ("input", ["x"]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}]),
        ("input", [{"type": "item_reference", "id": "x"}]), ("input", [{"type": "function_call", "name": "f"}]),
        ("input", [{"type": "function_call_output", "output": "x"}]), ("input", [{"role": "robot", "content": "x"}]),
        ("max_output_tokens", 0), ("tools", [{"type": "web_search"}]), ("tool_choice", "required"),
        ("truncation", "auto"), ("include", ["file_search_call.results"]), ("top_logprobs", 2), ("temperature", 3),
        ("text", {"format": {"type": "json_schema", "name": "x"}}), ("metadata", {"a": 1}), ("n", 2),
        ("text", {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strin"}}}),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(talking: Server, param: str, value: object, stream: bool) -> None:
    response = ask(talking, **{param: value}, stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and error["message"].startswith(param)


def test_input_too_long_is_refused_before_the_first_byte(talking: Server) -> None:
    response = ask(talking, input="a" * 4096, stream=True)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert response.json()["error"]["param"] == "input"


def test_a_fault_in_a_stream_is_a_failed_response(start: Start) -> None:
    server = start(Script(held=True, info=engine_info()))
    server.engine.allow(1)
    with server.http.stream("POST", "/v1/responses", json={"input": "Hi", "stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: response.created"
        server.engine.fail_sequences("a bad tensor")
        *_, final = [line for line in lines if line]
    failed = json.loads(final.removeprefix("data: "))
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {
        "code": "engine_error", "message": "the engine could not finish this sequence; the server's log says why",
    }  # fmt: skip
