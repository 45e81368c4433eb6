"""The wire of POST /v1/responses: its fields, the conversation they stand for, and the shape of answers."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from expertd_server.chat_schemas import MAX_TOOLS, ChatRequest, Effort, Function, ToolChoice
from expertd_server.constraints import ResponseFormat, SchemaFormat
from expertd_server.errors import InvalidRequest, clip
from expertd_server.fields import Body, parse_fields
from expertd_server.response_input import messages_of, tool_choice_of
from expertd_server.schemas import ExpertUsage, GenerationRequest, check_together

Input = Annotated[
    object,
    WithJsonSchema(
        {
            "title": "Input",
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "object"}},
            ],
        }
    ),
]
"""`response_input.messages_of` checks it."""


class TextFormat(SchemaFormat):
    type: Literal["text", "json_object", "json_schema"] = "text"


class TextOptions(Body):
    format: TextFormat = TextFormat.model_validate({})
    verbosity: Literal["low", "medium", "high"] = Field("medium", description="Accepted without effect.")


class Reasoning(Body):
    effort: Effort | None = Field(None, description="Given to templates that use it.")
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Accepted without effect: thoughts are given as they are."
    )


class _Typed(Body):
    type: Literal["function"]


class FunctionTool(Function, _Typed):
    """A function without the wrapping that chat has around it. Its type is checked first: others have other fields."""


class ResponsesRequest(GenerationRequest):
    """Body of POST /v1/responses. Nothing is stored: a conversation is sent whole."""

    unsupported: ClassVar[Mapping[str, str]] = {
        **GenerationRequest.unsupported,
        "previous_response_id": "nothing is stored; send the whole conversation as input",
        "conversation": "nothing is stored; send the whole conversation as input",
        "background": "a response is made while the client waits",
        "prompt": "there are no stored prompts",
        "context_management": "a conversation is served whole or refused",
        "max_tool_calls": "tools are run by the client",
        "top_logprobs": "use /v1/chat/completions",
        "response_format": "use text.format",
        "return_token_ids": "use /v1/chat/completions",
        "return_tokens_as_token_ids": "use /v1/chat/completions",
        "n": "a response is one answer",
    }
    without_effect: ClassVar[Set[str]] = {
        *GenerationRequest.without_effect, "store", "service_tier", "prompt_cache_key", "prompt_cache_retention",
        "safety_identifier", "truncation", "include", "stream_options",
    }  # fmt: skip

    input: Input
    instructions: str | None = Field(None, description="A system message in front of the input.")
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Default: what the window leaves.")
    text: TextOptions = TextOptions.model_validate({})
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS, description="Empty: none.")
    tool_choice: ToolChoice = Field(None, description="Only with tools; default: auto.")
    parallel_tool_calls: bool = Field(True, description="False: no call but the first is told.")
    reasoning: Reasoning = Reasoning.model_validate({})
    metadata: dict[str, Annotated[str, Field(max_length=512)]] = Field({}, max_length=16, description="Given back.")

    store: bool = Field(True, description="Accepted without effect: nothing is stored.")
    service_tier: str = Field("auto", description="Accepted without effect.")
    prompt_cache_key: str = Field("", description="Accepted without effect.")
    prompt_cache_retention: str = Field("", description="Accepted without effect.")
    safety_identifier: str = Field("", max_length=128, description="Accepted without effect.")
    truncation: Literal["disabled"] = Field("disabled", description="A conversation is served whole or refused.")
    include: list[Literal["reasoning.encrypted_content"]] = Field([], description="Accepted without effect.")

    @property
    def answer_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def alternatives(self) -> None:
        return None

    def as_chat(self) -> ChatRequest:
        """The same as a chat request. Raises InvalidRequest for input that is no conversation."""
        shared = {name: getattr(self, name) for name in GenerationRequest.model_fields if name in self.model_fields_set}
        shared.pop("stream_options", None)
        functions = [tool.model_dump(exclude={"type"}, exclude_unset=True) for tool in self.tools or ()]
        tools = [{"type": "function", "function": function} for function in functions]
        return ChatRequest.model_validate(
            {
                **shared,
                "messages": messages_of(self.input, self.instructions),
                "max_completion_tokens": self.max_output_tokens,
                "response_format": self._response_format(),
                "tools": tools or None,
                "tool_choice": tool_choice_of(self.tool_choice) if tools else None,
                "parallel_tool_calls": self.parallel_tool_calls,
                "reasoning_effort": self.reasoning.effort,
            }
        )

    def _response_format(self) -> ResponseFormat | None:
        given = self.text.format
        if given.type == "text":
            return None
        if given.type == "json_schema" and "schema_" not in given.model_fields_set:
            raise InvalidRequest("text.format.schema: required by type json_schema", param="text")
        return ResponseFormat(type=given.type, json_schema=given if given.type == "json_schema" else None)


def parse_response_request(body: object) -> ResponsesRequest:
    """The checked request, but for its input and tool choice. Raises InvalidRequest naming the first field at
    fault."""
    request = parse_fields(ResponsesRequest, body)
    if request.tools is not None and request.text.format.type != "text":
        raise InvalidRequest("text.format: not together with tools", param="text")
    if not request.tools and request.tool_choice not in (None, "none", "auto"):
        raise InvalidRequest(f"tool_choice: {clip(repr(request.tool_choice))} is allowed only with tools",
                             param="tool_choice")  # fmt: skip
    if not request.stream:
        request.stream_options = None
    check_together(request)
    return request


# ---------------------------------------------------------------- answers

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


class _Item(BaseModel):
    id: str
    status: Status = "in_progress"


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class ReasoningItem(_Item):
    type: Literal["reasoning"] = "reasoning"
    summary: list[Any] = []
    content: list[ReasoningText] = []


class CallItem(_Item):
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str = ""


Item = MessageItem | ReasoningItem | CallItem


class InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int = 0
    """Not counted apart: what is cached costs nothing."""


class OutputDetails(BaseModel):
    reasoning_tokens: int = 0
    """Not counted apart."""


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int
    expert: ExpertUsage | None = Field(None, exclude_if=lambda value: value is None)
    """With `include_expert_usage`."""


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(BaseModel):
    code: str
    message: str


class ResponseObject(BaseModel):
    """Answer of POST /v1/responses, and what the first and last events of a stream hold."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, Any]
    store: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
