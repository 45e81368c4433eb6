"""Finding tool calls in a model's text as it comes in. Pure.

A call is a JSON object with a name and arguments; forms differ in what stands around it. `ToolReader` gives out text
and pieces of calls as soon as they are certain and never takes anything back: joined pieces are the same however the
text was cut.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from expertd_server.detokenize import StopMatcher

ToolParser = Literal["hermes", "mistral", "json"]


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """What a form of calls looks like. Without an opening, a text that begins with a call is nothing but calls."""

    opening: str | None = None
    closing: str | None = None
    named_outside: bool = False
    """Whether `name[ARGS]{…}` may stand for an object with a name in it."""
    id_prefix: str = "call_"
    id_length: int = 24


SYNTAXES: Mapping[ToolParser, ToolSyntax] = {
    "hermes": ToolSyntax("<tool_call>", "</tool_call>"),
    # Mistral's templates refuse ids of another form when a call comes back in the history.
    "mistral": ToolSyntax("[TOOL_CALLS]", named_outside=True, id_prefix="", id_length=9),
    "json": ToolSyntax(),
}

MARKERS = frozenset({"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<tool_call>", "</tool_call>"})
"""Shown to the reader although some tokenizers call them special tokens, which are otherwise left out of a text."""


def detect(template: str, takes_tools: bool) -> ToolParser | None:
    """The form that a chat template teaches; None where it is one that is not known here. Where a template knows
    nothing of tools, they are described in the system message, which asks for bare JSON."""
    if not takes_tools:
        return "json"
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    return "json" if '{"name": ' in template and '"parameters": ' in template else None


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text before, between or after calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A part of a call. The first piece of a call has its id and name; arguments are JSON text, to be joined."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Piece = Text | CallPiece

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_OUTSIDE_HEAD = re.compile(r"([A-Za-z0-9_.-]+)(?:\[CALL_ID\][A-Za-z0-9]*)?\[ARGS\]\s*(?=\{)")
_OUTSIDE_BEGINNING = re.compile(r"[A-Za-z0-9_.-]+[A-Za-z0-9_\[\]\s]*\Z")
MAX_HEAD_CHARS = 1024
"""A call whose arguments begin later is told when it is whole: looking for the beginning again must stay cheap."""

_SPACES = " \t\r\n,;"
_SEPARATORS = _SPACES + "[]"


class ToolReader:
    """One answer's text. `names` are the tools there are; `single` leaves out every call but the first."""

    def __init__(self, syntax: ToolSyntax, names: Set[str], *, single: bool = False) -> None:
        self.called = False
        """Whether there was a call."""
        self._syntax = syntax
        self._names = names
        self._single = single
        self._index = 0
        self._buffer = ""
        self._skipped = ""
        """What stands before the present call: part of the text, should the call turn out not to be one."""
        self._spaces = ""
        """White space that is text only if text follows."""
        self._out: list[Piece] = []
        self._opening = StopMatcher([syntax.opening or ""])
        self._value = _Value()
        self._scanned = 0
        # Each state consumes what it can of the buffer; it says whether another one may go on with the rest.
        self._state: Callable[[], bool] = self._text if syntax.opening else self._beginning

    def feed(self, text: str) -> list[Piece]:
        """Take the next piece of text."""
        self._buffer += text
        while self._state():
            pass
        out, self._out = self._out, []
        return out

    def end(self) -> list[Piece]:
        """What was held back, now that nothing follows. A call that has begun stays as it is."""
        if self._state == self._text:
            self._say(self._opening.flush())
        elif self._state == self._head or (self._state in (self._beginning, self._between) and not self.called):
            self._say(self._skipped + self._buffer)
        if not self.called and self._spaces:
            self._out.append(Text(self._spaces))
        out, self._out = self._out, []
        return out

    # ------------------------------------------------------------ states

    def _text(self) -> bool:
        self._say(self._opening.feed(self._buffer))
        self._buffer = ""
        if self._opening.matched is None:
            return False
        self._buffer, self._skipped = self._opening.rest, self._opening.matched
        self._opening = StopMatcher([self._skipped])
        self._state = self._between
        return True

    def _beginning(self) -> bool:
        start = self._buffer.lstrip()
        if start:
            self._state = self._between if start[0] in "{[" else self._plain
        return bool(start)

    def _plain(self) -> bool:
        self._say(self._buffer)
        self._buffer = ""
        return False

    def _ignore(self) -> bool:
        self._buffer = ""
        return False

    def _between(self) -> bool:
        rest = self._buffer.lstrip(_SPACES)
        for marker in filter(None, (self._syntax.closing, self._syntax.opening)):
            if rest.startswith(marker):
                self._buffer, self._skipped = rest.removeprefix(marker), ""
                self._state = self._text if marker == self._syntax.closing else self._between
                return True
            if marker.startswith(rest):
                return False
        rest = rest.lstrip(_SEPARATORS)
        if not rest:
            return False
        self._skipped += self._buffer[: len(self._buffer) - len(rest)]
        self._buffer = rest
        return self._object_or_name(rest)

    def _object_or_name(self, rest: str) -> bool:
        if rest[0] == "{":
            self._value, self._scanned = _Value(), 0
            self._state = self._head
            return True
        if self._syntax.named_outside:
            head = _OUTSIDE_HEAD.match(rest)
            if head is not None:
                self._begin_call(head[1])
                self._buffer = rest[head.end() :]
                self._state = self._arguments_alone
                return True
            if _OUTSIDE_BEGINNING.match(rest):
                return False
        return self._no_call("")

    def _head(self) -> bool:
        head = _HEAD.match(self._buffer[:MAX_HEAD_CHARS])
        if head is not None and self._is_tool(name := _decoded(head[1])):
            self._begin_call(name)
            self._buffer = self._buffer[head.end() :]
            self._value = _Value()
            self._state = self._arguments
            return True
        end = self._value.feed(self._buffer[self._scanned :])
        if end is None:
            self._scanned = len(self._buffer)
            return False
        whole, self._buffer = self._buffer[: self._scanned + end], self._buffer[self._scanned + end :]
        return self._whole(whole)

    def _whole(self, text: str) -> bool:
        """An object whose beginning is not that of a call may be one in another order."""
        call = _decoded(text)
        if not isinstance(call, dict) or not self._is_tool(name := call.get("name")):
            return self._no_call(text)
        given = call.get("arguments") or call.get("parameters") or {}
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        self._begin_call(name)
        self._out.append(CallPiece(self._index, arguments))
        return self._end_call(self._between)

    def _arguments(self) -> bool:
        return self._read_arguments(self._tail)

    def _arguments_alone(self) -> bool:
        return self._read_arguments(self._between)

    def _read_arguments(self, then: Callable[[], bool]) -> bool:
        end = self._value.feed(self._buffer)
        piece, self._buffer = self._buffer[:end], "" if end is None else self._buffer[end:]
        if piece:
            self._out.append(CallPiece(self._index, piece))
        if end is None:
            return False
        self._value = _Value(depth=1)
        return self._end_call(then)

    def _tail(self) -> bool:
        """What is left of the object around the arguments."""
        end = self._value.feed(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is None:
            return False
        self._state = self._between
        return True

    # ------------------------------------------------------------ what states do

    def _is_tool(self, name: object) -> TypeGuard[str]:
        """A model may call a tool that there is not; but where nothing marks a call, only a tool's name does."""
        return isinstance(name, str) and bool(name) and (self._syntax.opening is not None or name in self._names)

    def _begin_call(self, name: str) -> None:
        self.called = True
        self._skipped = self._spaces = ""
        call_id = self._syntax.id_prefix + uuid.uuid4().hex[: self._syntax.id_length]
        self._out.append(CallPiece(self._index, "", call_id, name))

    def _end_call(self, then: Callable[[], bool]) -> bool:
        self._index += 1
        self._state = self._ignore if self._single else then
        return True

    def _no_call(self, text: str) -> bool:
        self._say(self._skipped + text)
        self._skipped = ""
        self._state = self._text if self._syntax.opening else self._plain
        return True

    def _say(self, text: str) -> None:
        text = self._spaces + text
        shown = text.rstrip()
        self._spaces = text[len(shown) :]
        if shown:
            self._out.append(Text(shown))


class _Value:
    """Finds the end of one JSON object in a text that comes in pieces; its syntax is not checked."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int | None:
        """How much of `text` belongs to the object, if it ends in there."""
        for i, character in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None


def _decoded(text: str) -> Any:
    """The JSON value, or None where it is not one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
