"""Which tools a request lets the model use, and the form of a call that must be made. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expertd_engine.messages import Constraint
from expertd_server.chat_schemas import Tool
from expertd_server.constraints import schema_constraint
from expertd_server.errors import InvalidRequest, clip

_ALLOWED = 'none, auto, required, {"type": "function", "function": {"name": …}} or {"type": "allowed_tools", …}'


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that the model is told of. `forced`: its answer is a call of one of them, and nothing else."""

    tools: list[Tool]
    forced: bool

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.tools)

    def constraint(self) -> Constraint:
        """What holds an answer to one call, as bare JSON. Raises InvalidRequest."""
        try:
            return schema_constraint(_any_call(self.tools))
        except RecursionError:
            raise InvalidRequest("tools: parameters are nested too deeply", param="tools") from None


def tools_to_use(tools: Sequence[Tool] | None, choice: object) -> ToolUse | None:
    """None where the model is told of no tools. Raises InvalidRequest for a choice that the tools do not allow."""
    if tools is None:
        if choice not in (None, "none"):
            raise _bad("allowed only with tools")
        return None
    if choice in (None, "auto", "required"):
        return ToolUse(list(tools), forced=choice == "required")
    if choice == "none":
        return None
    if isinstance(choice, dict) and choice.get("type") == "function":
        return ToolUse([_named(tools, choice)], forced=True)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(tools, choice.get("allowed_tools"))
    raise _bad(f"got {clip(repr(choice))}; allowed is {_ALLOWED}")


def _bad(what: str) -> InvalidRequest:
    return InvalidRequest(f"tool_choice: {what}", param="tool_choice")


def _named(tools: Sequence[Tool], reference: object) -> Tool:
    function = reference.get("function") if isinstance(reference, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    for tool in tools:
        if tool.function.name == name:
            return tool
    known = ", ".join(tool.function.name for tool in tools)
    raise _bad(f"there is no tool {clip(repr(name))}; there are {clip(known)}")


def _allowed(tools: Sequence[Tool], given: object) -> ToolUse:
    names = given.get("tools") if isinstance(given, dict) else None
    mode = given.get("mode") if isinstance(given, dict) else None
    if mode not in ("auto", "required") or not isinstance(names, list) or not names:
        raise _bad("allowed_tools needs a mode, auto or required, and a list of tools")
    return ToolUse([_named(tools, reference) for reference in names], forced=mode == "required")


def _any_call(tools: Sequence[Tool]) -> dict[str, Any]:
    """The schema of one call. What the tools' own schemas define moves to the root, where references begin."""
    definitions: dict[str, Any] = {}
    calls = [_call(tool, f"{i}.", definitions) for i, tool in enumerate(tools)]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions} if definitions else schema


def _call(tool: Tool, prefix: str, definitions: dict[str, Any]) -> dict[str, Any]:
    arguments = {k: v for k, v in tool.arguments.items() if k not in ("$defs", "definitions", "$schema")}
    for place in ("$defs", "definitions"):
        own = tool.arguments.get(place, {})
        if not isinstance(own, dict):
            raise InvalidRequest(
                f"tools: {place} of {tool.function.name} is not an object, but {clip(repr(own))}", param="tools"
            )
        for name, definition in own.items():
            definitions[prefix + name] = _redirected(definition, prefix)
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": _redirected(arguments, prefix)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _redirected(schema: Any, prefix: str) -> Any:
    """`schema` with references to its own definitions pointing to where they have moved."""
    if isinstance(schema, list):
        return [_redirected(item, prefix) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _redirected(value, prefix) for key, value in schema.items()}
    reference = moved.get("$ref")
    for place in ("#/$defs/", "#/definitions/"):
        if isinstance(reference, str) and reference.startswith(place):
            moved["$ref"] = f"#/$defs/{prefix}{reference.removeprefix(place)}"
    return moved
