"""The OpenAI wire: what a body may hold, what every field means when it is null, and the shape of every answer.

Known fields with bad values are refused with the field's name; unknown fields are accepted. Types are strict (no "5"
for 5, no true for 1); null means "as if absent" everywhere. What depends on the model (vocabulary, window) is checked
in `choices.plan_sequences`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from expertd_server.errors import InvalidRequest, UnsupportedParameter, clip

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 1024

WITHOUT_EFFECT = frozenset({"user"})
"""Known fields that are accepted and change nothing."""

UNSUPPORTED = {
    "suffix": "the model has no fill-in-the-middle template",
    "response_format": "constrained output is not available",
    "structured_outputs": "constrained output is not available",
    "guided_json": "constrained output is not available",
    "guided_regex": "constrained output is not available",
    "guided_choice": "constrained output is not available",
    "guided_grammar": "constrained output is not available",
    "json_schema": "constrained output is not available",
    "grammar": "constrained output is not available",
    "regex": "constrained output is not available",
    "ebnf": "constrained output is not available",
    "allowed_token_ids": "constrained output is not available",
    "bad_words": "constrained output is not available; see logit_bias",
    "include_stop_str_in_output": "stop strings are never part of the text",
    "truncate_prompt_tokens": "prompts are served whole or refused",
}
"""Fields that promise something about the answer which we cannot give, and why. Absent, null and false are fine."""

Prompt = Annotated[
    object,
    WithJsonSchema(
        {
            "title": "Prompt",
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
                {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                },
            ],
        }
    ),
]
"""Any of the four forms; `prompts.parse` checks them, because a union's error would list four failures."""

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0)]


def _allow_null(schema: dict[str, Any]) -> None:
    """Say in the published schema what `_Body._null_is_absent` does: null is fine wherever a default exists."""
    for name, prop in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [prop, {"type": "null"}]}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, json_schema_extra=_allow_null)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class CompletionRequest(_Body):
    """Body of POST /v1/completions."""

    model: str = Field("", description="Empty or absent: the model this server serves.")
    prompt: Prompt
    max_tokens: int = Field(16, ge=0, le=2**31 - 1, description="0 only with echo.")
    min_tokens: int = Field(0, ge=0, le=2**31 - 1)
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="0 and -1 are off.")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    logit_bias: dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]
    ] = Field({}, max_length=MAX_LOGIT_BIAS)  # fmt: skip
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] = []
    stop_token_ids: list[TokenId] = Field([], max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, description="Only the value of n.")
    stream: bool = False
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1, description="Lower runs first.")
    expert_mode: Literal["exact"] = "exact"
    user: str = Field("", description="Accepted without effect.")

    @property
    def stops(self) -> list[str]:
        """The stop strings, whichever form they came in."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


def parse_completion(body: object) -> CompletionRequest:
    """The checked request. Raises InvalidRequest naming the first field at fault."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {clip(type(body).__name__)}", code="invalid_json")
    for name in UNSUPPORTED.keys() & body.keys():
        if body[name] is not None and body[name] is not False:
            raise UnsupportedParameter(name, UNSUPPORTED[name])
    try:
        request = CompletionRequest.model_validate(body)
    except ValidationError as error:
        raise _invalid(error) from None
    _check_together(request)
    return request


def unknown_fields(body: dict[str, Any]) -> list[str]:
    """Names in the body that mean nothing here."""
    return sorted(body.keys() - CompletionRequest.model_fields.keys() - UNSUPPORTED.keys())


def _check_together(request: CompletionRequest) -> None:
    """What no single field can tell."""
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest("max_tokens: 0 is allowed only with echo; give at least 1", param="max_tokens")
    if request.min_tokens > request.max_tokens:
        raise InvalidRequest(
            f"min_tokens: {request.min_tokens} is more than max_tokens, which is {request.max_tokens}",
            param="min_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options: allowed only with stream: true", param="stream_options")
    if request.best_of not in (None, request.n):
        raise UnsupportedParameter("best_of", f"only the value of n, which is {request.n}, is; got {request.best_of}")


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first field's problem in words; where it has several forms, that of the form which came nearest. `loc` may
    hold the name of a form: only the path that the client knows is told."""
    problems = error.errors(include_url=False, include_context=False)
    first = max((p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]), key=lambda p: len(p["loc"]))
    path = [str(part) for part in first["loc"] if not str(part).startswith(("constrained-", "list[", "function-"))]
    name = ".".join(path) or "body"
    if first["type"] == "missing":
        return InvalidRequest(f"{name}: this field is required", param=name)
    return InvalidRequest(f"{clip(name)}: {first['msg']}, got {clip(repr(first['input']))}", param=clip(path[0]))


# ---------------------------------------------------------------- answers


class Usage(BaseModel):
    """Prompts counted once each, answers summed over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(BaseModel):
    """Four parallel lists. The first prompt token of an echo has null in both logprob lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token that ended the text; null when the model ended it or the length did."""


class Completion(BaseModel):
    """Answer of POST /v1/completions, and every chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "expertd"
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
