"""OpenAI's own Python client, 2.x and 3.x, which refuses whatever does not match its types."""

from __future__ import annotations

import os

import openai
from openai import OpenAI

URL = os.environ["EXPERTD_URL"]
MODEL = "demo"


def lenient(client: OpenAI) -> OpenAI:
    """The client's types forbid what OpenAI itself sends: the null logprob of an echoed prompt's first token, and the
    null `finish_reason` of a completion's chunks."""
    copy = client.with_options()
    copy._strict_response_validation = False
    return copy


def completions(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=8, temperature=0)
    assert answer.choices[0].text.startswith(" Paris"), answer
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    logged = lenient(client).completions.create(
        model=MODEL, prompt=["One, two,", "Red, green,"], n=2, echo=True, logprobs=2, max_tokens=3, seed=7
    )
    assert [c.index for c in logged.choices] == [0, 1, 2, 3]
    for choice in logged.choices:
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.token_logprobs[-1] is not None


def stream(client: OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    chunks = list(lenient(client).completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    whole = client.completions.create(**asked)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage is not None and chunks[-1].usage == whole.usage


def chat(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    asked = {"model": MODEL, "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert "Paris" in (answer.choices[0].message.content or ""), answer
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content
    pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == answer.choices[0].message.content


def forms_and_tools(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    schema |= {"additionalProperties": False}  # so that a small model, too, comes to an end
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    messages = [{"role": "user", "content": "Where is the Louvre?"}]
    asked = {"model": MODEL, "messages": messages, "max_tokens": 64, "temperature": 0}
    answer = client.chat.completions.create(**asked, response_format=form)
    assert answer.choices[0].message.content and '"city"' in answer.choices[0].message.content, answer
    tools = [{"type": "function", "function": {"name": "look_up", "description": "Look up.", "parameters": schema}}]
    called = client.chat.completions.create(**asked, tools=tools, tool_choice="required")
    assert called.choices[0].finish_reason == "tool_calls", called
    calls = called.choices[0].message.tool_calls
    assert calls and calls[0].type == "function" and calls[0].function.name == "look_up"


def responses(client: OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=64, temperature=0)
    assert answer.output_text, answer
    kinds = [
        e.type for e in client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=64, stream=True)
    ]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete")


def errors(client: OpenAI) -> None:
    try:
        client.completions.create(model="other", prompt="a")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found" and error.request_id
    else:
        raise AssertionError("another model was served")
    try:
        client.completions.create(model=MODEL, prompt="a", temperature=3)
    except openai.BadRequestError as error:
        assert error.param == "temperature"
    else:
        raise AssertionError("a temperature of 3 was taken")


def main() -> None:
    client = OpenAI(base_url=URL + "/v1", api_key="unused", max_retries=0, _strict_response_validation=True)
    assert [m.id for m in client.models.list()]
    for part in (completions, chat, forms_and_tools, responses, errors, stream):
        part(client)
        print(part.__name__)
    print(f"openai {openai.__version__}: ok")


if __name__ == "__main__":
    main()
