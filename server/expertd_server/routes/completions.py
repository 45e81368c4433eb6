"""POST /v1/completions: prompts in any of four forms, and answers in OpenAI's older shape."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from fastapi import APIRouter, Request, Response

from expertd_server.choices import Delta, LoggedToken
from expertd_server.errors import ApiError
from expertd_server.generation import Job, plan_job, read_and_plan, respond
from expertd_server.prompts import EncodedPrompt, parse
from expertd_server.records import RequestRecord
from expertd_server.routes.generating import generating_router
from expertd_server.schemas import Completion, CompletionChoice, CompletionRequest, Logprobs, Usage, parse_completion
from expertd_server.service import ServedModel, Service
from expertd_server.sse import DONE, error_event, event

ENDPOINT = "/v1/completions"


def router(service: Service) -> APIRouter:
    """The routes of this module, bound to `service`."""
    return generating_router(service, ENDPOINT, CompletionRequest, Completion, create_completion)


async def create_completion(service: Service, http: Request, record: RequestRecord) -> Response:
    """Continue one or more prompts. With `stream: true` the answer is a stream of server-sent events."""

    async def plan(model: ServedModel, request: CompletionRequest) -> Job:
        return await plan_job(service, model, request, await _encode(model, request), record)

    request, job = await read_and_plan(service, http, record, parse_completion, plan)
    return await respond(http, job, _Wording(job, request))


async def _encode(model: ServedModel, request: CompletionRequest) -> list[EncodedPrompt]:
    window, keep_last = model.info.max_model_len, request.truncate_prompt_tokens
    return await model.codec.encode(
        parse(request.prompt), model.info.vocab_size, window, add_special_tokens=request.add_special_tokens,
        keep_last=max(window - request.max_tokens, 1) if keep_last == -1 else keep_last,
    )  # fmt: skip


class _Wording:
    """Completion objects. A stream has chunks, the usage chunk if asked for, and `[DONE]`."""

    def __init__(self, job: Job, request: CompletionRequest) -> None:
        self._job = job
        self._request = request
        self._id = f"cmpl-{uuid.uuid4().hex}"

    def whole(self, choices: list[Delta]) -> Completion:
        return self._completion([_choice(self._request, delta) for delta in choices], self._job.usage())

    def events(self, delta: Delta) -> Iterator[bytes]:
        if not delta.is_empty:
            usage = self._job.usage() if self._request.wants_running_usage else None
            yield event(self._completion([_choice(self._request, delta)], usage))

    def end(self) -> Iterator[bytes]:
        if self._request.wants_usage:
            yield event(self._completion([], self._job.usage()))
        yield DONE

    def failure(self, error: ApiError) -> Iterator[bytes]:
        yield error_event(error)
        yield DONE

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(
            id=self._id, created=self._job.created, model=self._job.model.name, choices=choices, usage=usage,
            system_fingerprint=self._job.model.fingerprint,
        )  # fmt: skip


def _choice(request: CompletionRequest, delta: Delta) -> CompletionChoice:
    return CompletionChoice(
        index=delta.index,
        text=delta.text,
        logprobs=_logprobs(delta.tokens) if request.logprobs is not None else None,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
        prompt_token_ids=delta.prompt_token_ids,
        token_ids=delta.token_ids if request.return_token_ids else None,
    )


def _logprobs(tokens: list[LoggedToken]) -> Logprobs:
    return Logprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_top(token) for token in tokens],
        text_offset=[token.offset for token in tokens],
    )


def _top(token: LoggedToken) -> dict[str, float] | None:
    """Alternatives by text, the chosen token always among them. Of several with one text, the likeliest stays."""
    if token.top is None or token.logprob is None:
        return None
    top: dict[str, float] = {}
    for alternative in token.top:
        top.setdefault(alternative.text, alternative.logprob)
    top.setdefault(token.text, token.logprob)
    return top
