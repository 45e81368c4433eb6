"""Tools: what the model is told, calls in answers and streams, forced calls, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from support import chat_templates
from support.fake_engine import Script
from support.fake_numbers import engine_info
from support.fake_store import write_store
from support.running_server import Server, running
from support.streams import events

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": PARAMETERS}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}


def tool_of(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "odd", "parameters": parameters}}


DEEP: dict[str, Any] = {}
for _ in range(600):
    DEEP = {"items": DEEP}
USER: Any = {"role": "user", "content": "Weather in Paris?"}

ARGUMENTS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}


def last(server: Server) -> Any:
    return list(server.engine.submitted.values())[-1]


def prompt(server: Server) -> str:
    codec = server.daemon.service.serving().codec
    return codec.decode_all(last(server).inputs[0].token_ids)


def joined(chunks: list[Any]) -> list[dict[str, Any]]:
    """The calls of a stream; checks that id, type and name come once, with the first piece."""
    calls: list[dict[str, Any]] = []
    for chunk in chunks:
        for piece in chunk["choices"][0]["delta"].get("tool_calls", ()):
            if piece["index"] == len(calls):
                assert piece.keys() == {"index", "id", "type", "function"}
                calls.append({"id": piece["id"], "name": piece["function"]["name"], "arguments": ""})
            else:
                assert piece.keys() == {"index", "function"}
                assert piece["function"].keys() == {"arguments"}
            calls[piece["index"]]["arguments"] += piece["function"]["arguments"]
    return calls


def test_the_official_client_gets_a_call_and_sends_its_result_back(
    talking: Server, talking_client: openai.OpenAI
) -> None:
    talking.script.answer = b"Let me see.\n" + CALL.encode()
    answer = talking_client.chat.completions.create(model="", messages=[USER], tools=[WEATHER, CLOCK])
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    assert '"name": "weather"' in prompt(talking)
    assert '"name": "clock"' in prompt(talking)

    talking.script.answer = b"It rains."
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    history: Any = [USER, choice.message.model_dump(), result]
    again = talking_client.chat.completions.create(model="", messages=history, tools=[WEATHER])
    assert (again.choices[0].message.content, again.choices[0].finish_reason) == ("It rains.", "stop")
    assert f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}</tool_call>' in prompt(talking)
    assert "<|tool|>rain" in prompt(talking)


def test_the_official_clients_stream_helper_puts_calls_together(talking: Server, talking_client: openai.OpenAI) -> None:
    talking.script.answer = CALL.encode()
    with talking_client.chat.completions.stream(model="", messages=[USER], tools=[WEATHER]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls is not None
    assert final.choices[0].message.tool_calls[0].function.arguments == ARGUMENTS


def test_calls_are_streamed_in_pieces(talking: Server) -> None:
    talking.script.answer = f"Both.{CALL}\n{CALL}".encode()
    got = events(talking.chat(messages=[USER], tools=[WEATHER], stream=True).text)
    calls = joined(got)
    assert [(call["name"], call["arguments"]) for call in calls] == [("weather", ARGUMENTS)] * 2
    assert calls[0]["id"] != calls[1]["id"]
    assert sum("tool_calls" in chunk["choices"][0]["delta"] for chunk in got) > 4
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in got) == "Both."
    assert (got[-1]["choices"][0]["delta"], got[-1]["choices"][0]["finish_reason"]) == ({}, "tool_calls")


def test_a_client_may_want_no_more_than_one_call(talking: Server) -> None:
    talking.script.answer = f"{CALL}\n{CALL}".encode()
    message = talking.chat(tools=[WEATHER], parallel_tool_calls=False).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1


def test_thoughts_come_before_calls(talking: Server) -> None:
    talking.script.answer = f"<think>which?</think>{CALL}".encode()
    message = talking.chat(tools=[WEATHER]).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("which?", None)
    assert len(message["tool_calls"]) == 1


def test_a_call_that_is_cut_off_ends_by_length(talking: Server) -> None:
    talking.script.answer = CALL.encode()
    choice = talking.chat(tools=[WEATHER], max_tokens=CALL.index("Par")).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_must_be_is_held_to_its_schema(talking: Server, choice: object, stream: bool) -> None:
    talking.script.answer = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'.encode()
    response = talking.chat(messages=[USER], tools=[WEATHER, CLOCK], tool_choice=choice, stream=stream)
    constraint = last(talking).sampling.constraint
    schema = json.loads(constraint.text)
    calls = [schema] if choice == NAMED else schema["anyOf"]
    assert constraint.kind == "json_schema"
    assert calls[0]["properties"] == {"name": {"const": "weather"}, "arguments": PARAMETERS}
    assert len(calls) == (1 if choice == NAMED else 2)
    if stream:
        made = [(call["name"], call["arguments"]) for call in joined(events(response.text))]
    else:
        message = response.json()["choices"][0]["message"]
        assert message["content"] is None
        made = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    assert made == [("weather", ARGUMENTS)]


def test_with_no_choice_the_model_is_told_of_no_tools(talking: Server) -> None:
    talking.script.answer = CALL.encode()
    message = talking.chat(tools=[WEATHER], tool_choice="none").json()["choices"][0]["message"]
    assert message["content"] == CALL
    assert "weather" not in prompt(talking)


def test_a_template_without_tools_gets_them_in_the_system_message(tmp_path: Path) -> None:
    store = write_store(tmp_path, chat_template=chat_templates.CHATML)
    with running(store) as start:
        server = start(Script(info=engine_info(max_model_len=4096)))
        server.script.answer = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'.encode()
        history = [
            {"role": "system", "content": "Be brief."}, USER,
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": i, "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}} for i in "ab"]},
            {"role": "tool", "tool_call_id": "a", "content": "rain"},
            {"role": "tool", "tool_call_id": "b", "content": "wind"},
        ]  # fmt: skip
        choice = server.chat(messages=history, tools=[WEATHER]).json()["choices"][0]
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": ARGUMENTS}
        assert choice["finish_reason"] == "tool_calls"
        told = prompt(server)
        assert told.startswith("<|system|>Be brief.\n\nYou may call tools.")
        assert '"name": "weather", "parameters"' in told or '"name": "weather", "description"' in told
        assert told.count(f'{{"name": "weather", "arguments": {ARGUMENTS}}}') == 2
        assert "<|user|>Result of the tool: rain\nResult of the tool: wind\n<|assistant|>" in told


@pytest.mark.parametrize(
    ("template", "parser", "served"),
    [(chat_templates.UNREAD_TOOLS, "auto", False), (chat_templates.UNREAD_TOOLS, "json", True),
     (chat_templates.HERMES, "none", False)],
)  # fmt: skip
def test_tools_are_refused_where_nothing_reads_calls(tmp_path: Path, template: str, parser: str, served: bool) -> None:
    with running(write_store(tmp_path, chat_template=template)) as start:
        server = start(Script(info=engine_info(max_model_len=4096)), tool_parser=parser)
        response = server.chat(tools=[WEATHER], max_tokens=1)
        assert response.status_code == (200 if served else 400)
        if not served:
            assert response.json()["error"]["code"] == "unsupported_parameter"
            assert "--tool-parser" in response.json()["error"]["message"]
        assert server.chat(max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": []}, "tools"), ({"tools": "x"}, "tools"), ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [CLOCK] * 129}, "tools"), ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"), ({"tool_choice": NAMED}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [CLOCK], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tools": [CLOCK], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": [tool_of({"$defs": [1]})], "tool_choice": "required"}, "tools"),
        ({"tools": [tool_of(DEEP)], "tool_choice": "required"}, "tools"),
    ],
    ids=lambda value: repr(value)[:50],
)  # fmt: skip
def test_tools_that_make_no_sense_are_refused(talking: Server, body: dict[str, Any], param: str, stream: bool) -> None:
    response = talking.chat(**body, stream=stream)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_plain_response_format_goes_with_tools(talking: Server) -> None:
    response = talking.chat(tools=[CLOCK], response_format={"type": "text"}, tool_choice=None, max_tokens=1)
    assert response.status_code == 200
