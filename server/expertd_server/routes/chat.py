"""POST /v1/chat/completions: a conversation through the model's own template, and messages in OpenAI's shape."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Request, Response

from expertd_server.chat_format import ChatPlan, MessagePiece, MessageReader, Thought
from expertd_server.chat_schemas import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChosenLogprob,
    ChunkChoice,
    FinishReason,
    FunctionCall,
    FunctionPiece,
    TokenLogprob,
    ToolCall,
    ToolCallPiece,
    parse_chat,
)
from expertd_server.choices import Delta, LoggedToken
from expertd_server.errors import ApiError, ContextLengthExceeded
from expertd_server.generation import Job, plan_job, read_and_plan, respond
from expertd_server.prompts import TextCodec
from expertd_server.records import RequestRecord
from expertd_server.routes.generating import generating_router
from expertd_server.schemas import Usage
from expertd_server.service import ServedModel, Service
from expertd_server.sse import DONE, error_event, event
from expertd_server.tool_calls import CallPiece, Text

ENDPOINT = "/v1/chat/completions"


def router(service: Service) -> APIRouter:
    """The routes of this module, bound to `service`."""
    return generating_router(service, ENDPOINT, ChatRequest, ChatCompletion, create_chat_completion)


async def create_chat_completion(service: Service, http: Request, record: RequestRecord) -> Response:
    """Answer a conversation. With `stream: true` the answer is a stream of server-sent events."""
    request, (job, plan) = await read_and_plan(
        service, http, record, parse_chat, lambda model, request: plan_chat(service, model, request, record)
    )
    return await respond(http, job, _Wording(job, request, plan))


async def plan_chat(
    service: Service, model: ServedModel, request: ChatRequest, record: RequestRecord
) -> tuple[Job, ChatPlan]:
    """Render and tokenize a conversation, and plan its answer. Raises InvalidRequest."""
    plan = await asyncio.to_thread(model.chat.plan, request)
    try:
        prompts = await model.codec.encode(
            [plan.prompt], model.info.vocab_size, model.info.max_model_len, add_special_tokens=False
        )
        return await plan_job(service, model, request, prompts, record, plan.demand, plan.decode), plan
    except ContextLengthExceeded as error:
        error.param = "messages"
        raise


class _Wording:
    """Chat objects. A stream's first chunk of a choice has the role, its last an empty delta and the reason; then come
    the usage chunk if asked for, and `[DONE]`."""

    def __init__(self, job: Job, request: ChatRequest, plan: ChatPlan) -> None:
        self._job = job
        self._request = request
        self._plan = plan
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._readers: dict[int, MessageReader] = {}

    def whole(self, choices: list[Delta]) -> ChatCompletion:
        return ChatCompletion(
            id=self._id, created=self._job.created, model=self._job.model.name,
            choices=[self._choice(delta) for delta in choices], usage=self._job.usage(),
            system_fingerprint=self._job.model.fingerprint,
        )  # fmt: skip

    def _choice(self, delta: Delta) -> ChatChoice:
        reader = self._plan.reader()
        return ChatChoice(
            index=delta.index,
            message=message_of([*reader.feed(delta.text), *reader.end()]),
            logprobs=self._logprobs(delta),
            finish_reason=_finish_reason(delta, reader),
            stop_reason=delta.stop_reason,
            prompt_token_ids=delta.prompt_token_ids,
            token_ids=delta.token_ids if self._request.return_token_ids else None,
        )

    def events(self, delta: Delta) -> Iterator[bytes]:
        reader = self._readers.get(delta.index)
        if reader is None:
            reader = self._readers[delta.index] = self._plan.reader()
            yield self._chunk(
                ChunkChoice(
                    index=delta.index, delta=ChatDelta(role="assistant", content=""),
                    prompt_token_ids=delta.prompt_token_ids,
                )
            )  # fmt: skip
        pieces = reader.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += reader.end()
        yield from self._pieces(delta, pieces)
        if delta.finish_reason is not None:
            reason = _finish_reason(delta, reader)
            yield self._chunk(
                ChunkChoice(
                    index=delta.index, delta=ChatDelta(), finish_reason=reason, stop_reason=delta.stop_reason
                )
            )  # fmt: skip

    def _pieces(self, delta: Delta, pieces: Sequence[MessagePiece]) -> Iterator[bytes]:
        """A chunk for each piece; tokens go with the first, or alone while their text is held back."""
        logprobs = self._logprobs(delta)
        token_ids = delta.token_ids or None
        words = [_delta_of(piece) for piece in pieces]
        if not words and (delta.tokens or token_ids):
            words = [ChatDelta(content="")]
        for word in words:
            yield self._chunk(ChunkChoice(index=delta.index, delta=word, logprobs=logprobs, token_ids=token_ids))
            logprobs = token_ids = None

    def end(self) -> Iterator[bytes]:
        if self._request.wants_usage:
            yield self._chunk(None, self._job.usage())
        yield DONE

    def failure(self, error: ApiError) -> Iterator[bytes]:
        yield error_event(error)
        yield DONE

    def _chunk(self, choice: ChunkChoice | None, usage: Usage | None = None) -> bytes:
        if usage is None and self._request.wants_running_usage:
            usage = self._job.usage()
        return event(
            ChatChunk(
                id=self._id, created=self._job.created, model=self._job.model.name,
                choices=[choice] if choice is not None else [], usage=usage,
                system_fingerprint=self._job.model.fingerprint,
            )
        )  # fmt: skip

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if self._request.alternatives is None:
            return None
        return chat_logprobs(delta.tokens, self._job.model.codec)


def _finish_reason(delta: Delta, reader: MessageReader) -> FinishReason:
    return "tool_calls" if reader.called and delta.finish_reason == "stop" else delta.finish_reason or "stop"


def message_of(pieces: Sequence[MessagePiece]) -> ChatMessage:
    """The pieces of one answer, joined."""
    content = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    calls = calls_of(pieces)
    return ChatMessage(
        content=content if content or not calls else None,
        reasoning_content=thought or None,
        tool_calls=calls or None,
    )


def calls_of(pieces: Sequence[MessagePiece]) -> list[ToolCall]:
    """The calls among the pieces, each whole."""
    calls: list[ToolCall] = []
    for piece in pieces:
        if not isinstance(piece, CallPiece):
            continue
        if piece.id is not None and piece.name is not None:
            calls.append(ToolCall(id=piece.id, function=FunctionCall(name=piece.name, arguments="")))
        calls[-1].function.arguments += piece.arguments
    return calls


def _delta_of(piece: MessagePiece) -> ChatDelta:
    if isinstance(piece, Text):
        return ChatDelta(content=piece.text)
    if isinstance(piece, Thought):
        return ChatDelta(reasoning_content=piece.text)
    call = ToolCallPiece(
        index=piece.index, id=piece.id, type="function" if piece.id is not None else None,
        function=FunctionPiece(name=piece.name, arguments=piece.arguments),
    )  # fmt: skip
    return ChatDelta(tool_calls=[call])


def chat_logprobs(tokens: Sequence[LoggedToken], codec: TextCodec) -> ChatLogprobs:
    """Log-probabilities in chat's own shape."""
    return ChatLogprobs(content=[_chosen(token, codec) for token in tokens])


def _chosen(token: LoggedToken, codec: TextCodec) -> ChosenLogprob:
    own = _token_logprob(token.token_id, token.text, token.logprob or 0.0, codec)
    top = [_token_logprob(other.token_id, other.text, other.logprob, codec) for other in token.top or ()]
    return ChosenLogprob(**own.model_dump(), top_logprobs=top)


def _token_logprob(token_id: int, text: str, logprob: float, codec: TextCodec) -> TokenLogprob:
    raw = codec.token_bytes.of(token_id)
    return TokenLogprob(token=text, logprob=logprob, bytes=None if raw is None else list(raw))
