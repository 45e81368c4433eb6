"""The OpenAI wire: what a body may hold, what every field means when it is null, and the shape of every answer.

`GenerationRequest` has what all endpoints that generate text share. What depends on the model (vocabulary, window) is
checked in `choices.plan_sequences`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from expertd_server.constraints import ResponseFormat, StructuredOutputs
from expertd_server.errors import InvalidRequest, UnsupportedParameter
from expertd_server.fields import Body, parse_fields

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 1024
MAX_ALLOWED_TOKENS = 65536
MAX_BAD_WORDS = 256
MAX_SALT_CHARS = 128

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


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(Body, ABC):
    """What every request for text may hold, whatever its endpoint."""

    unsupported: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema", "grammar", "regex", "ebnf"),
        "ask for it through structured_outputs or response_format",
    )
    without_effect: ClassVar[Set[str]] = {"user"}

    model: str = Field("", description="Empty or absent: the model this server serves.")
    min_tokens: int = Field(0, ge=0, le=2**31 - 1)
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="0 and -1 are off.")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    logit_bias: dict[
        Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]
    ] = Field({}, max_length=MAX_LOGIT_BIAS)  # fmt: skip
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] = Field([])
    include_stop_str_in_output: bool = False
    stop_token_ids: list[TokenId] = Field([], max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False
    allowed_token_ids: list[TokenId] | None = Field(
        None, min_length=1, max_length=MAX_ALLOWED_TOKENS, description="Nothing but these is generated."
    )
    bad_words: list[StopString] = Field([], max_length=MAX_BAD_WORDS, description="Never generated.")
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = Field(False, description="Name tokens `token_id:7` in logprobs.")
    cache_salt: str = Field(
        "",
        max_length=MAX_SALT_CHARS,
        pattern=r"^[^@/\\\x00]*$",
        description="Cached prefixes are shared only within it.",
    )
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1, description="Lower runs first.")
    expert_mode: Literal["exact", "virtual"] | None = Field(
        None, description="virtual: experts that are there answer for others. Default: the server's."
    )
    max_substituted_mass: float | None = Field(
        None, ge=0, le=1, description="virtual: share of a token's gate weight that others may answer for in a layer."
    )
    include_expert_usage: bool = Field(False, description="Report in `usage.expert` what the experts cost.")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str = Field("", description="Accepted without effect.")

    @property
    def stops(self) -> list[str]:
        """The stop strings, whichever form they came in."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk is to hold the usage so far."""
        return self.stream_options is not None and self.wants_usage and self.stream_options.continuous_usage_stats

    @property
    @abstractmethod
    def answer_limit(self) -> int | None:
        """Most tokens of an answer; None: as many as the window leaves."""

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """Alternatives to report with each token's log-probability; None reports nothing."""

    @property
    def echoes(self) -> bool:
        """Whether an answer begins with its prompt."""
        return False


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    unsupported: ClassVar[Mapping[str, str]] = {
        **GenerationRequest.unsupported,
        "suffix": "the model has no fill-in-the-middle template",
    }

    prompt: Prompt
    max_tokens: int = Field(16, ge=0, le=2**31 - 1, description="0 only with echo.")
    best_of: int | None = Field(None, ge=1, description="Only the value of n.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = Field(True, description="What the tokenizer puts around a text, such as BOS.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="Keep the last so many tokens of each prompt; -1: as many as fit."
    )

    @property
    def answer_limit(self) -> int:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return self.echo


def parse_completion(body: object) -> CompletionRequest:
    """The checked request. Raises InvalidRequest naming the first field at fault."""
    request = parse_fields(CompletionRequest, body)
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest("max_tokens: 0 is allowed only with echo; give at least 1", param="max_tokens")
    if request.truncate_prompt_tokens == 0:
        raise InvalidRequest(
            "truncate_prompt_tokens: 0 would leave no prompt; give -1 or at least 1", param="truncate_prompt_tokens"
        )
    if request.best_of not in (None, request.n):
        raise UnsupportedParameter("best_of", f"only the value of n, which is {request.n}, is; got {request.best_of}")
    check_together(request)
    return request


def check_together(request: GenerationRequest) -> None:
    """What no single field can tell, and is the same for every endpoint."""
    if request.answer_limit is not None and request.min_tokens > request.answer_limit:
        raise InvalidRequest(
            f"min_tokens: {request.min_tokens} is more than the answer's limit, which is {request.answer_limit}",
            param="min_tokens",
        )
    if request.expert_mode == "exact" and request.max_substituted_mass:
        raise InvalidRequest(
            f"max_substituted_mass: {request.max_substituted_mass} is allowed only with expert_mode: virtual",
            param="max_substituted_mass",
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options: allowed only with stream: true", param="stream_options")


# ---------------------------------------------------------------- answers


class ExpertUsage(BaseModel):
    """What the experts cost, summed over the request's sequences. Steps are shared, so sums over requests exceed the
    totals on /metrics."""

    hits: int
    late: int
    misses: int
    loaded_bytes: int
    stall_ms: float
    substitutions: int = 0
    """Choices of a token that another expert answered for, over all layers. In exact mode there are none."""
    substituted_share: float = 0.0
    """Of all its choices."""
    substituted_mass: float = 0.0
    """Gate weight that these had, 0 to 1, on average over tokens and layers."""


class PromptTokensDetails(BaseModel):
    cached_tokens: int
    """Prompt tokens that no choice had to compute: an earlier request began alike."""


class Usage(BaseModel):
    """Prompts counted once each, answers summed over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    expert: ExpertUsage | None = Field(None, exclude_if=lambda value: value is None)
    """With `include_expert_usage`."""


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
    prompt_token_ids: list[int] | None = None
    """With `return_token_ids`; in a stream, on the choice's first chunk."""
    token_ids: list[int] | None = None


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
