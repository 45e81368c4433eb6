"""The wire of POST /v1/chat/completions: its fields, and the shapes of answers and chunks."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from expertd_server.constraints import demanded
from expertd_server.conversation import ROLES
from expertd_server.errors import InvalidRequest
from expertd_server.fields import Body, parse_fields
from expertd_server.schemas import MAX_LOGPROBS, GenerationRequest, Usage, check_together

MAX_TOOLS = 128

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_PART = {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}}

Messages = Annotated[
    object,
    WithJsonSchema(
        {
            "title": "Messages",
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role"],
                "properties": {
                    "role": {"enum": list(ROLES)},
                    "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]},
                },
            },
        }
    ),
]
"""`conversation.checked_messages` checks them, because a union's error would list one failure for each role."""

ToolChoice = Annotated[
    object,
    WithJsonSchema(
        {"title": "Tool choice", "anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]},
    ),
]
"""`tool_choice.tools_to_use` checks it."""


class Function(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = Field({}, description="A JSON schema; a call that must be made is held to it.")
    strict: bool = False


class Tool(Body):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As templates expect it: what the client gave, and a schema in any case."""
        function = self.function.model_dump(exclude_unset=True)
        return {"type": "function", "function": {"description": "", **function, "parameters": self.arguments}}

    @property
    def arguments(self) -> dict[str, Any]:
        """The schema of its arguments."""
        return self.function.parameters or {"type": "object", "properties": {}}


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    unsupported: ClassVar[Mapping[str, str]] = {
        **GenerationRequest.unsupported,
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "this model writes text",
        "web_search_options": "there is no web search here",
        "moderation": "there is no moderation here",
        "echo": "the prompt is the template's",
        "chat_template": "the model's own is used",
        "continue_final_message": "an answer is always a new message",
    }
    without_effect: ClassVar[Set[str]] = {
        *GenerationRequest.without_effect, "store", "metadata", "service_tier", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "verbosity", "prediction", "modalities",
    }  # fmt: skip

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Default: what the window leaves.")
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Older name of max_completion_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Only with logprobs.")
    tools: list[Tool] | None = Field(None, min_length=1, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = Field(None, description="Only with tools; default: auto.")
    parallel_tool_calls: bool = Field(True, description="False: no call but the first is told.")
    reasoning_effort: Effort | None = Field(None, description="Given to templates that use it.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Variables for the template.")
    documents: list[dict[str, Any]] | None = Field(None, description="Given to templates that use them.")
    add_generation_prompt: bool = Field(True, description="End the prompt with the beginning of an answer.")

    store: bool = Field(False, description="Accepted without effect: nothing is stored.")
    metadata: dict[str, Annotated[str, Field(max_length=512)]] = Field(
        {}, max_length=16, description="Accepted without effect."
    )
    service_tier: str = Field("auto", description="Accepted without effect.")
    prompt_cache_key: str = Field("", description="Accepted without effect.")
    prompt_cache_options: dict[str, Any] = Field({}, description="Accepted without effect.")
    prompt_cache_retention: str = Field("", description="Accepted without effect.")
    safety_identifier: str = Field("", max_length=128, description="Accepted without effect.")
    verbosity: Literal["low", "medium", "high"] = Field("medium", description="Accepted without effect.")
    prediction: dict[str, Any] = Field({}, description="Accepted without effect.")
    modalities: list[Literal["text"]] = Field(["text"], description="Accepted without effect: there is only text.")

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parse_chat(body: object) -> ChatRequest:
    """The checked request, but for its messages and tool choice. Raises InvalidRequest naming the first field at
    fault."""
    request = parse_fields(ChatRequest, body)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs: allowed only with logprobs: true", param="top_logprobs")
    demand = demanded(request.response_format, request.structured_outputs)
    if demand is not None and request.tools is not None:
        raise InvalidRequest(f"{demand.param}: not together with tools", param=demand.param)
    check_together(request)
    return request


# ---------------------------------------------------------------- answers


def _sparse() -> Any:
    """A field that is absent where it has no value: clients print explicit nulls, or fail on them."""
    return Field(None, exclude_if=lambda value: value is None)


class FunctionCall(BaseModel):
    name: str
    arguments: str
    """The text of a JSON object, unless the answer ended in its midst."""


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    reasoning_content: str | None = _sparse()
    tool_calls: list[ToolCall] | None = _sparse()


class TokenLogprob(BaseModel):
    """`bytes` is null where a token stands for no bytes of its own."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]
    refusal: None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class _TokenIds(BaseModel):
    prompt_token_ids: list[int] | None = _sparse()
    """With `return_token_ids`; in a stream, on the choice's first chunk."""
    token_ids: list[int] | None = _sparse()


class ChatChoice(_TokenIds):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    """The stop string or stop token that ended the text; null when the model ended it or the length did."""


class ChatCompletion(BaseModel):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class FunctionPiece(BaseModel):
    name: str | None = _sparse()
    arguments: str


class ToolCallPiece(BaseModel):
    """A part of a call; id, type and name come with its first."""

    index: int
    id: str | None = _sparse()
    type: Literal["function"] | None = _sparse()
    function: FunctionPiece


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = _sparse()
    content: str | None = _sparse()
    reasoning_content: str | None = _sparse()
    tool_calls: list[ToolCallPiece] | None = _sparse()


class ChunkChoice(_TokenIds):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = _sparse()


class ChatChunk(BaseModel):
    """One event of a stream. The first of a choice has its role, the last its finish reason and an empty delta."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str
