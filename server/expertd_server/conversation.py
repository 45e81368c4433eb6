"""The messages of a conversation: what a client may send, and what a chat template is given of them. Pure.

Only text is taken. Parts that name an image, a sound or a file are refused by their type: nothing that a message points
to is ever opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from expertd_server.errors import InvalidRequest, clip

MAX_MESSAGES = 4096

ROLES = ("developer", "system", "user", "assistant", "tool", "function")

Message = dict[str, Any]
"""`role`, `content`, and what else the role has, as templates know it: arguments of calls are objects, not text."""


def checked_messages(given: object) -> list[Message]:
    """The messages of a request. Raises InvalidRequest naming the one at fault."""
    if not isinstance(given, list) or not given:
        raise _bad("messages", f"got {clip(repr(given))}; allowed is a list of at least one message")
    if len(given) > MAX_MESSAGES:
        raise _bad("messages", f"{len(given)} messages; at most {MAX_MESSAGES} are allowed")
    return [checked_message(message, f"messages[{i}]") for i, message in enumerate(given)]


def _bad(where: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{where}: {what}", param=where)


def checked_message(given: object, where: str) -> Message:
    """One message; `where` is its name in errors. Raises InvalidRequest."""
    if not isinstance(given, dict):
        raise _bad(where, f"got {clip(repr(given))}; a message is an object with a role and content")
    role = given.get("role")
    if role not in ROLES:
        raise _bad(f"{where}.role", f"got {clip(repr(role))}; allowed are {', '.join(ROLES)}")
    message: Message = {"role": role}
    calls = _calls(given, where) if role == "assistant" else []
    content = given.get("content")
    if content is None and not calls:
        raise _bad(f"{where}.content", "required: a string, or a list of text parts")
    message["content"] = None if content is None else _content(content, f"{where}.content")
    message |= _strings(given, ("name", "tool_call_id", "reasoning_content"), where)
    if calls:
        message["tool_calls"] = calls
    if role == "tool" and "tool_call_id" not in message:
        raise _bad(f"{where}.tool_call_id", "required: the id of the call that this answers")
    if role == "function":  # the older form of a tool's answer
        message["role"] = "tool"
    return message


def _strings(given: Mapping[str, Any], names: Sequence[str], where: str) -> Message:
    found = {name: given[name] for name in names if given.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, str):
            raise _bad(f"{where}.{name}", f"got {clip(repr(value))}; allowed is a string")
    return found


def _content(given: object, where: str) -> str:
    """The text; several parts stand on lines of their own."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        raise _bad(where, f"got {clip(repr(given))}; allowed is a string, or a list of text parts")
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(given))


_TEXT_OF_PART = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}


def _part(given: object, where: str) -> str:
    if not isinstance(given, dict):
        raise _bad(where, f"got {clip(repr(given))}; a part is an object with a type")
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_OF_PART:
        raise _bad(where, f"parts of type {clip(repr(kind))} are not supported: this model takes text")
    text = given.get(_TEXT_OF_PART[kind])
    if not isinstance(text, str):
        raise _bad(f"{where}.{_TEXT_OF_PART[kind]}", f"got {clip(repr(text))}; allowed is a string")
    return text


def _calls(given: Mapping[str, Any], where: str) -> list[Message]:
    calls = given.get("tool_calls")
    if calls is None:
        older = given.get("function_call")
        return [] if older is None else [_call({"function": older}, f"{where}.function_call")]
    if not isinstance(calls, list):
        raise _bad(f"{where}.tool_calls", f"got {clip(repr(calls))}; allowed is a list of calls")
    return [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _call(given: object, where: str) -> Message:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _bad(where, f"got {clip(repr(given))}; a call is an object with a function, which has a name")
    arguments = function.get("arguments", "{}")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise _bad(f"{where}.function.arguments", f"got {clip(repr(arguments))}; allowed is the text of a JSON object")
    call = {"type": "function", "function": {"name": function["name"], "arguments": parsed}}
    return call | _strings(given, ("id",), where)


# ---------------------------------------------------------------- for templates


def for_template(messages: Sequence[Message], template: str, *, knows_tools: bool) -> list[Message]:
    """The messages in words that `template` knows: a developer is a system unless it speaks of developers; where it
    knows nothing of tools, calls and their results are written out."""
    named = [
        m | {"role": "system"} if m["role"] == "developer" and "developer" not in template else m for m in messages
    ]
    return named if knows_tools else _written_out(named)


def with_instructions(messages: Sequence[Message], text: str) -> list[Message]:
    """`text` at the end of the first message if that is the system's, else in a system message of its own."""
    if messages and messages[0]["role"] == "system":
        return [messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def tool_instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model whose template knows nothing of tools is told of them."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        'You may call tools. To call one, answer with nothing but a JSON object: {"name": the tool\'s name, '
        f'"arguments": an object with its arguments}}. These are the tools:\n{listed}'
    )


def _written_out(messages: Sequence[Message]) -> list[Message]:
    written: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"Result of the tool: {message['content']}"
            if written and written[-1].get("results"):
                written[-1]["content"] += f"\n{result}"
            else:
                written.append({"role": "user", "content": result, "results": True})
        elif "tool_calls" in message:
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
            written.append({"role": "assistant", "content": "\n".join(filter(None, (message["content"], *calls)))})
        else:
            written.append(message)
    return written
