"""The model's own chat template, rendered the way transformers does, inside jinja's sandbox and inside bounds.

A template comes with a checkpoint, so it is somebody else's program: it can reach nothing but what it is given, and its
time and output are bounded. Rendering is synchronous: call it on a worker thread.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from expertd_engine.errors import StoreError
from expertd_server.errors import InvalidRequest, clip

RENDER_TIMEOUT_S = 2.0
MAX_RENDERED_CHARS = 16 * 2**20

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Message = Mapping[str, Any]
"""A message as templates know it: `role`, `content`, and what else the role has."""


class TemplateRefused(InvalidRequest):
    """The template does not take these messages, or exceeds its bounds; its own words are in the message."""

    code = "invalid_messages"

    def __init__(self, words: object) -> None:
        super().__init__(f"the model's chat template refuses these messages: {clip(words)}", param="messages")


class _OutOfBounds(jinja2.TemplateError):
    pass


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here its block is like any other."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Counts the time of the rendering on this thread at every look-up and call: no loop does without them for long,
    because the sandbox bounds `range`."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = _now
        self._rendering = threading.local()

    def render_within(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The template's output. Raises jinja2.TemplateError when it takes too long or grows too large."""
        self._rendering.deadline_s = time.monotonic() + RENDER_TIMEOUT_S
        pieces, size = [], 0
        for piece in template.generate(variables):
            pieces.append(piece)
            size += len(self._bounded(piece))
            if size > MAX_RENDERED_CHARS:
                raise _OutOfBounds(f"it made more than {MAX_RENDERED_CHARS} characters")
        return "".join(pieces)

    def _bounded(self, value: Any) -> Any:
        if time.monotonic() > getattr(self._rendering, "deadline_s", float("inf")):
            raise _OutOfBounds(f"it took longer than {RENDER_TIMEOUT_S:g} seconds")
        if isinstance(value, str) and len(value) > MAX_RENDERED_CHARS:
            raise _OutOfBounds(f"it made a string of more than {MAX_RENDERED_CHARS} characters")
        return value

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._bounded(super().getitem(obj, argument))

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._bounded(super().getattr(obj, attribute))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self._bounded(super().call(context, obj, *args, **kwargs))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """transformers' own: jinja's escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


_sandbox = _Sandbox()

_RENDER_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
    MemoryError,
)  # fmt: skip
"""What a template can do wrong with messages that it was not made for."""


class ChatTemplate:
    """A compiled template. Thread-safe."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Raises StoreError where `source` is not a template."""
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._compiled = _sandbox.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(_sandbox.parse(source)))
        except jinja2.TemplateError as error:
            raise StoreError(f"the model's chat template is not one: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; `variables` are the template's own. Raises TemplateRefused."""
        given = {
            **self._special_tokens, **(variables or {}), "messages": messages, "tools": tools, "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        try:
            return _sandbox.render_within(self._compiled, given)
        except _RENDER_ERRORS as error:
            raise TemplateRefused(str(error) or type(error).__name__) from None


def load_templates(settings: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """The templates in a checkpoint's tokenizer settings by name: `default`, where there is one, and perhaps
    `tool_use`. Raises StoreError."""
    given = settings.get("chat_template")
    if given is None:
        return {}
    tokens = {name: text for name in _SPECIAL_TOKENS if (text := _token_text(settings.get(name))) is not None}
    sources = {"default": given} if isinstance(given, str) else {str(t["name"]): str(t["template"]) for t in given}
    return {name: ChatTemplate(source, tokens) for name, source in sources.items()}


def _token_text(value: object) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
