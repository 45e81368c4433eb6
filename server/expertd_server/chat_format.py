"""How the served model converses: its chat template, the form of its tool calls, the tags around its thoughts.

`ChatFormat` is made once for a model and turns requests into prompts; a `MessageReader` turns one answer's text into
the parts of a message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from expertd_server.chat_schemas import ChatRequest
from expertd_server.constraints import Demand, demanded
from expertd_server.conversation import checked_messages, for_template, tool_instructions, with_instructions
from expertd_server.detokenize import Decode
from expertd_server.errors import InvalidRequest, UnsupportedParameter
from expertd_server.prompts import TextCodec
from expertd_server.reasoning import ReasoningSplitter, ReasoningTags, tags_of
from expertd_server.templates import ChatTemplate, load_templates
from expertd_server.tool_calls import MARKERS, SYNTAXES, CallPiece, Text, ToolParser, ToolReader, ToolSyntax, detect
from expertd_server.tool_choice import ToolUse, tools_to_use


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of what the model thinks before it answers."""

    text: str


MessagePiece = Text | Thought | CallPiece


class MessageReader:
    """Parts of one message, as its text comes in. Joined pieces are the same however the text was cut."""

    def __init__(self, reasoning: ReasoningSplitter | None, tools: ToolReader | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def called(self) -> bool:
        """Whether the message calls a tool."""
        return self._tools is not None and self._tools.called

    def feed(self, text: str) -> list[MessagePiece]:
        """Take the next piece of text."""
        if self._reasoning is None:
            return self._answer(text)
        split = self._reasoning.feed(text)
        return [*_thought(split.reasoning), *self._answer(split.answer)]

    def end(self) -> list[MessagePiece]:
        """What was held back, now that nothing follows."""
        pieces: list[MessagePiece] = []
        if self._reasoning is not None:
            split = self._reasoning.end()
            pieces += [*_thought(split.reasoning), *self._answer(split.answer)]
        return [*pieces, *(self._tools.end() if self._tools is not None else ())]

    def _answer(self, text: str) -> list[MessagePiece]:
        if not text:
            return []
        return [Text(text)] if self._tools is None else [*self._tools.feed(text)]


def _thought(text: str) -> list[Thought]:
    return [Thought(text)] if text else []


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """What a conversation comes to: the prompt, what the answer must look like, and how to read it."""

    prompt: str
    demand: Demand | None
    decode: Decode | None
    """None: as the request has it."""
    tags: ReasoningTags | None
    tools: ToolUse | None
    syntax: ToolSyntax | None
    single: bool
    """No call but the first is told."""

    def reader(self) -> MessageReader:
        """For one choice."""
        reasoning = ReasoningSplitter(self.tags, self.prompt) if self.tags is not None else None
        if self.syntax is None or self.tools is None:
            return MessageReader(reasoning, None)
        return MessageReader(reasoning, ToolReader(self.syntax, self.tools.names, single=self.single))


class ChatFormat:
    """Thread-safe: never changed after it was made."""

    def __init__(self, codec: TextCodec, parser: str = "auto") -> None:
        """`parser` is a `ToolParser`, `auto` or `none`. Raises StoreError where the template is not one."""
        self._templates = load_templates(codec.settings)
        source = "\n".join(template.source for template in self._templates.values())
        self._knows_tools = any("tools" in template.variables for template in self._templates.values())
        self._syntax = _syntax(parser, source, self._knows_tools)
        self._tags = tags_of(source)
        self._decode = codec.decoder_showing(MARKERS.union(self._tags or ()))

    @property
    def available(self) -> bool:
        """Whether the model has a template, without which it takes no conversations."""
        return bool(self._templates)

    def plan(self, request: ChatRequest) -> ChatPlan:
        """Render the conversation, which takes time: call it on a worker thread. Raises InvalidRequest."""
        messages = checked_messages(request.messages)
        use = tools_to_use(request.tools, request.tool_choice)
        template = self._template(use is not None)
        self._check(request, template, use)
        messages = for_template(messages, template.source, knows_tools=self._knows_tools)
        tools = [tool.for_template() for tool in use.tools] if use is not None else None
        if tools is not None and not self._knows_tools:
            messages, tools = with_instructions(messages, tool_instructions(tools)), None
        prompt = template.render(
            messages, tools=tools, documents=request.documents, add_generation_prompt=request.add_generation_prompt,
            variables=_variables(request, template),
        )  # fmt: skip
        return self._planned(request, prompt, use)

    def _planned(self, request: ChatRequest, prompt: str, use: ToolUse | None) -> ChatPlan:
        forced = use is not None and use.forced
        demand = demanded(request.response_format, request.structured_outputs)
        if use is not None and use.forced:
            demand = Demand(use.constraint(), "tools")
        # What must have a form has it from its first token on: there is no room for a thought or a marker.
        tags = self._tags if demand is None else None
        reads = tags is not None or use is not None
        return ChatPlan(
            prompt=prompt,
            demand=demand,
            decode=self._decode if reads and request.skip_special_tokens else None,
            tags=tags,
            tools=use,
            syntax=SYNTAXES["json"] if forced else self._syntax,
            single=forced or not request.parallel_tool_calls,
        )

    def _template(self, with_tools: bool) -> ChatTemplate:
        name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidRequest("messages: the model has no chat template; use /v1/completions", param="messages")
        return self._templates[name]

    def _check(self, request: ChatRequest, template: ChatTemplate, use: ToolUse | None) -> None:
        if use is not None and self._syntax is None:
            raise UnsupportedParameter(
                "tools", "no parser reads the form of calls that the model's template teaches; see --tool-parser"
            )
        if request.documents is not None and "documents" not in template.variables:
            raise UnsupportedParameter("documents", "the model's chat template takes none")


def _syntax(parser: str, source: str, knows_tools: bool) -> ToolSyntax | None:
    chosen: ToolParser | None
    if parser == "auto":
        chosen = detect(source, knows_tools)
    else:
        chosen = next((name for name in SYNTAXES if name == parser), None)
    return SYNTAXES[chosen] if chosen is not None else None


def _variables(request: ChatRequest, template: ChatTemplate) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    if request.reasoning_effort is not None:
        if "reasoning_effort" in template.variables:
            variables["reasoning_effort"] = request.reasoning_effort
        elif request.reasoning_effort == "none" and "enable_thinking" in template.variables:
            variables["enable_thinking"] = False
    return variables | request.chat_template_kwargs
