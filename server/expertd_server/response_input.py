"""Items of a Responses request as the messages of a chat. Pure."""

from __future__ import annotations

from typing import Any

from expertd_server.conversation import Message, checked_message
from expertd_server.errors import InvalidRequest, clip


def messages_of(given: object, instructions: str | None) -> list[Message]:
    """The conversation. Calls that follow each other are one message, as are a thought and what it led to. Raises
    InvalidRequest naming the item at fault."""
    messages: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str) and given:
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise _bad("input", f"got {clip(repr(given))}; allowed is text, or a list of at least one item")
    for i, item in enumerate(given):
        _add(messages, item, f"input[{i}]")
    if "thought_only" in messages[-1]:
        messages.pop()
    return messages


def tool_choice_of(choice: object) -> object:
    """A tool choice in chat's form."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function" and "name" in choice:
        return _reference(choice)
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [_reference(tool) for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return choice


def _reference(tool: object) -> object:
    return {"type": "function", "function": {"name": tool.get("name")}} if isinstance(tool, dict) else tool


def _bad(where: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{where}: {what}", param="input")


def _add(messages: list[Message], item: object, where: str) -> None:
    if not isinstance(item, dict):
        raise _bad(where, f"got {clip(repr(item))}; an item is an object")
    kind = item.get("type", "message")
    if kind == "message":
        _add_message(messages, {name: item.get(name) for name in ("role", "content")}, where)
    elif kind == "function_call":
        _add_call(messages, item, where)
    elif kind == "function_call_output":
        message = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
        _check(message, where)
        messages.append(message)
    elif kind == "reasoning":
        messages.append({"role": "assistant", "reasoning_content": _thought(item), "thought_only": True})
    else:
        raise _bad(where, f"items of type {clip(repr(kind))} are not supported")


def _check(message: Message, where: str) -> None:
    try:
        checked_message(message, where)
    except InvalidRequest as error:
        error.param = "input"
        raise


def _add_message(messages: list[Message], message: Message, where: str) -> None:
    _check(message, where)
    thought = _taken_thought(messages) if message["role"] == "assistant" else {}
    messages.append({**thought, **message})


def _add_call(messages: list[Message], item: dict[str, Any], where: str) -> None:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"type": "function", "id": item.get("call_id"), "function": function}
    message: Message = {"role": "assistant", "content": None, "tool_calls": [call]}
    _check(message, where)
    if messages and messages[-1]["role"] == "assistant" and "thought_only" not in messages[-1]:
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({**_taken_thought(messages), **message})


def _taken_thought(messages: list[Message]) -> Message:
    """The thought at the end of the conversation, which belongs to what comes next."""
    if messages and "thought_only" in messages[-1]:
        return {"reasoning_content": messages.pop()["reasoning_content"]}
    return {}


def _thought(item: dict[str, Any]) -> str:
    parts = item.get("content")
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "\n".join(text for text in texts if isinstance(text, str))
