"""POST /v1/chat/completions: prompts from conversations, shapes of answers and chunks, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from support import chat_templates
from support.fake_engine import Script
from support.fake_numbers import engine_info
from support.fake_store import MAX_MODEL_LEN, MODEL_NAME, TOKENIZER, VOCAB_SIZE, write_store
from support.running_server import Server, Start, running
from support.streams import events

USER = {"role": "user", "content": "Hi"}


def prompt(server: Server) -> str:
    """What the engine was last given."""
    sent = list(server.engine.submitted.values())[-1]
    return str(TOKENIZER.decode(sent.inputs[0].token_ids, skip_special_tokens=False))


def error(response: Any, param: str | None = None, status: int = 400) -> str:
    found = response.json()["error"]
    assert response.status_code == status, found
    if param is not None:
        assert found["param"] == param
    return str(found["message"])


def test_the_official_client_gets_a_whole_answer(client: openai.OpenAI, server: Server) -> None:
    server.script.answer = b" Paris"
    answer = client.chat.completions.create(model=MODEL_NAME, messages=[{"role": "user", "content": "Where?"}])
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", MODEL_NAME, "chatcmpl-")
    assert answer.choices[0].message.content == " Paris"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert prompt(server) == "user: Where?\nassistant: "


def test_the_official_client_gets_a_stream(client: openai.OpenAI, server: Server) -> None:
    server.script.answer = b"ab"
    stream = client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": "Hi"}], stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_chunks_begin_with_the_role_and_end_with_an_empty_delta(server: Server) -> None:
    server.script.answer = b"ab"
    got = events(server.chat(stream=True, stream_options={"include_usage": True}).text)
    choices = [chunk["choices"][0] for chunk in got[:-1]]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {},
    ]  # fmt: skip
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in got[:-1])
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["total_tokens"] == got[-1]["usage"]["prompt_tokens"] + 3


def test_every_choice_of_a_stream_has_its_own_beginning_and_end(server: Server) -> None:
    got = events(server.chat(stream=True, n=3, max_tokens=2).text)
    for index in range(3):
        deltas = [c["choices"][0] for c in got if c["choices"][0]["index"] == index]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        assert [d["finish_reason"] for d in deltas if d["finish_reason"]] == ["length"]
        assert deltas[-1]["delta"] == {}


def test_choices_and_seeds_are_those_of_completions(server: Server) -> None:
    answers = [server.chat(n=2, seed=7, max_tokens=4).json()["choices"] for _ in range(2)]
    texts = [[choice["message"]["content"] for choice in choices] for choices in answers]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [({}, MAX_MODEL_LEN - 20), ({"max_tokens": 3}, 3), ({"max_completion_tokens": 2, "max_tokens": 3}, 2),
     ({"max_completion_tokens": 1000}, MAX_MODEL_LEN - 20)],
)  # fmt: skip
def test_an_answer_may_fill_what_the_window_leaves(server: Server, limits: dict[str, int], tokens: int) -> None:
    usage = server.chat(**limits).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (20, tokens)


def test_a_conversation_that_leaves_no_room_is_refused(server: Server) -> None:
    response = server.chat(messages=[{"role": "user", "content": "a" * MAX_MODEL_LEN}])
    assert "window" in error(response, "messages")
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_chats_own_shape(server: Server, stream: bool) -> None:
    server.script.answer = "é".encode()
    response = server.chat(logprobs=True, top_logprobs=2, stream=stream)
    parts = [c["choices"][0]["logprobs"] for c in (events(response.text) if stream else [response.json()])]
    tokens = [token for part in parts if part is not None for token in part["content"]]
    assert [token["bytes"] for token in tokens] == [[0xC3], [0xA9], list(b"<|endoftext|>")]
    assert [token["logprob"] for token in tokens] == [-1.0] * 3
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert tokens[0]["top_logprobs"][0].keys() == {"token", "logprob", "bytes"}


def test_logprobs_without_alternatives_have_none(server: Server) -> None:
    content = server.chat(logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in content] == [[]]
    assert server.chat(max_tokens=1).json()["choices"][0]["logprobs"] is None


def test_a_stop_string_ends_a_message(server: Server) -> None:
    server.script.answer = b"one STOP two"
    choice = server.chat(stop=" STOP").json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("one", "stop", " STOP")


@pytest.mark.parametrize("stop", [None, "b"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_the_usage_says_what_the_experts_cost_if_asked(
    server: Server, chat: bool, stream: bool, stop: str | None
) -> None:
    server.script.answer = b"abc"
    ask = server.chat if chat else server.complete
    options = {"stream_options": {"include_usage": True}} if stream else {}
    response = ask(include_expert_usage=True, n=2, stop=stop, stream=stream, **options)
    usage = (events(response.text)[-1] if stream else response.json())["usage"]
    assert usage["expert"] == {
        "hits": 6, "late": 0, "misses": 2, "loaded_bytes": 8192, "stall_ms": 0.0, "substitutions": 0,
        "substituted_share": 0.0, "substituted_mass": 0.0,
    }  # fmt: skip
    assert "expert" not in ask().json()["usage"]


def test_all_roles_and_parts_reach_the_template(server: Server) -> None:
    messages = [
        {"role": "developer", "content": "A"},
        {"role": "system", "content": [{"type": "text", "text": "B"}, {"type": "text", "text": "C"}]},
        {"role": "user", "content": "D", "name": "ann"},
        {"role": "assistant", "content": "E", "tool_calls": None, "refusal": None},
        {"role": "user", "content": ""},
    ]
    assert server.chat(messages=messages, max_tokens=1).status_code == 200
    assert prompt(server) == "system: A\nsystem: B\nC\nuser: D\nassistant: E\nuser: \nassistant: "


def test_the_template_may_have_variables(talking: Server) -> None:
    assert talking.chat(reasoning_effort="low", max_tokens=1).status_code == 200
    assert prompt(talking).endswith("<|assistant|>low")
    talking.chat(chat_template_kwargs={"enable_thinking": False}, add_generation_prompt=True, max_tokens=1)
    assert prompt(talking).endswith("<|assistant|><think></think>")
    talking.chat(add_generation_prompt=False, max_tokens=1)
    assert prompt(talking) == "<|user|>Hi\n"


BAD_MESSAGES: list[tuple[Any, str]] = [
    (None, "messages"), ([], "messages"), ("Hi", "messages"), ({}, "messages"), (["Hi"], "messages[0]"),
    ([{"role": "robot", "content": "x"}], "messages[0].role"), ([{"content": "x"}], "messages[0].role"),
    ([{"role": ["user"], "content": "x"}], "messages[0].role"),
    ([{"role": "user", "content": None}], "messages[0].content"), ([{"role": "user"}], "messages[0].content"),
    ([{"role": "assistant", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": []}], "messages[0].content"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
    ([USER, {"role": "user", "content": [{"type": "text"}]}], "messages[1].content[0].text"),
    ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
    ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
    ([{"role": "assistant", "tool_calls": "x"}], "messages[0].tool_calls"),
    ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
     "messages[0].tool_calls[0].function.arguments"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("messages", "param"), BAD_MESSAGES, ids=lambda value: repr(value)[:50])
def test_a_message_that_is_none_is_refused_by_its_place(
    server: Server, messages: object, param: str, stream: bool
) -> None:
    assert error(server.chat(messages=messages, stream=stream), param)


@pytest.mark.parametrize(
    "part",
    [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
     {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
     {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, {"type": "file", "file": {"file_id": "x"}}],
)  # fmt: skip
def test_what_is_not_text_is_refused_by_its_type(server: Server, part: dict[str, Any]) -> None:
    message = error(server.chat(messages=[{"role": "user", "content": [part]}]), "messages[0].content[0]")
    assert part["type"] in message
    assert "passwd" not in message


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_completion_tokens", 0), ("max_tokens", 0), ("max_tokens", "5"), ("logprobs", 1), ("top_logprobs", 2),
        ("top_logprobs", 21), ("n", 0), ("temperature", 2.1), ("logit_bias", {str(VOCAB_SIZE): 1}), ("stop", [""]),
        ("seed", 2**64), ("min_tokens", 100), ("stream_options", {}), ("modalities", ["audio"]), ("audio", {}),
        ("functions", []), ("function_call", "auto"), ("web_search_options", {}), ("chat_template", "{{ 1 }}"),
        ("continue_final_message", True), ("reasoning_effort", "huge"), ("documents", [{"a": 1}]), ("echo", True),
        ("metadata", {"a": 1}), ("metadata", {str(i): "" for i in range(17)}), ("guided_json", {}),
        ("response_format", {"type": "xml"}), ("structured_outputs", {}), ("expert_mode", "fast"),
        ("chat_template_kwargs", []),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_field_with_a_bad_value_is_refused_by_name(server: Server, param: str, value: object, stream: bool) -> None:
    body = {"stream": stream} if stream and param != "stream_options" else {}
    limits = {"max_tokens": 50} if param == "min_tokens" else {}
    assert error(server.chat(**body, **limits, **{param: value}), param)


def test_fields_without_effect_and_unknown_ones_are_accepted(server: Server) -> None:
    ignored = {
        "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "x",
        "safety_identifier": "y", "user": "z", "verbosity": "low", "modalities": ["text"],
        "prediction": {"type": "content", "content": ""},
        "made_up": [1], "functions": None, "parallel_tool_calls": True, "reasoning_effort": "none",
    }  # fmt: skip
    assert server.chat(**ignored, max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
         "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"regex": "[a-z]+"}}, "regex", "[a-z]+"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice", '["yes", "no"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chat", [False, True])
def test_the_form_asked_for_reaches_the_engine(
    server: Server, chat: bool, fields: dict[str, Any], kind: str, text: str
) -> None:
    response = (server.chat if chat else server.complete)(**fields, max_tokens=1)
    assert response.status_code == 200, response.text
    constraint = list(server.engine.submitted.values())[-1].sampling.constraint
    assert constraint is not None
    assert (constraint.kind, constraint.text) == (kind, text)


def test_thoughts_are_told_apart_whole_and_streamed(talking: Server) -> None:
    talking.script.answer = b"<think>\nhm, so\n</think>\n\nYes."
    message = talking.chat().json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, so", "Yes.")
    deltas = [chunk["choices"][0]["delta"] for chunk in events(talking.chat(stream=True).text)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm, so"
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."


def test_an_answer_held_to_a_form_has_no_thoughts(talking: Server) -> None:
    talking.script.answer = b"<think>"
    message = talking.chat(response_format={"type": "json_object"}).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<think>", "refusal": None}


def test_a_model_without_thoughts_has_none(server: Server) -> None:
    server.script.answer = b"<think>a</think>"
    assert "reasoning_content" not in server.chat().json()["choices"][0]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_template_refuses_in_its_own_words(tmp_path: Path, stream: bool) -> None:
    with running(write_store(tmp_path, chat_template=chat_templates.STRICT)) as start:
        server = start()
        response = server.chat(messages=[USER, USER], stream=stream)
        assert "roles must alternate user/assistant" in error(response, "messages")
        assert server.chat(max_tokens=1).status_code == 200


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with running(write_store(tmp_path, chat_template=None)) as start:
        assert "no chat template" in error(start().chat(), "messages")


def test_a_server_that_is_loading_refuses(start: Start) -> None:
    response = start(ready=False).chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_loading")


def test_a_fault_after_the_first_chunk_is_an_event(start: Start) -> None:
    server = start(Script(held=True, info=engine_info()))
    server.engine.allow(1)
    with server.http.stream(
        "POST", "/v1/chat/completions", json={"messages": [USER], "stream": True, "max_tokens": 5}
    ) as response:
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        server.engine.fail_sequences("a bad tensor")
        rest = [line for line in lines if line]
    assert '"code":"engine_error"' in rest[-2]
    assert "a bad tensor" not in rest[-2]  # it may name paths: the log has it
    assert rest[-1] == "data: [DONE]"
