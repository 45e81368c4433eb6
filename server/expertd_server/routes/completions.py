"""POST /v1/completions: validate, tokenize, admit, then answer whole or as a stream.

Whatever can be refused is refused before the first byte, for streams too: the answer begins when the engine has sent
something. `_generate` owns the request while the engine works on it: permit, sequences, record; it ends all three
however it ends.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from expertd_engine.messages import Submit, TextInput
from expertd_server.body import read_json
from expertd_server.choices import Choice, Delta, LoggedToken, PlannedSequence, plan_sequences
from expertd_server.envelope import request_id
from expertd_server.errors import ApiError, ErrorBody, declared, error_body
from expertd_server.prompts import EncodedPrompt, parse
from expertd_server.records import RequestRecord
from expertd_server.schemas import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    Logprobs,
    Usage,
    parse_completion,
    unknown_fields,
)
from expertd_server.service import ServedModel, Service
from expertd_server.sse import DONE, EventStream, event, while_connected

logger = logging.getLogger("expertd.server")

ENDPOINT = "/v1/completions"


@dataclass(slots=True)
class Job:
    """One request on its way: what was asked, by which model, and what has become of it so far."""

    service: Service
    model: ServedModel
    request: CompletionRequest
    prompts: list[EncodedPrompt]
    planned: list[PlannedSequence]
    record: RequestRecord
    choices: list[Choice]
    completion_id: str
    created: int

    def usage(self) -> Usage:
        prompt = sum(len(p.token_ids) for p in self.prompts)
        completion = sum(choice.completion_tokens for choice in self.choices)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(
            id=self.completion_id, created=self.created, model=self.model.name, choices=choices, usage=usage,
            system_fingerprint=self.model.fingerprint,
        )  # fmt: skip


def router(service: Service) -> APIRouter:
    """The routes of this module, bound to `service`."""
    routes = APIRouter()

    @routes.post(
        ENDPOINT,
        response_model=Completion,
        responses=dict(declared(400, 404, 413, 415, 500, 503)),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/CompletionRequest"}}},
            }
        },
    )
    async def create_completion(request: Request) -> Response:
        """Continue one or more prompts. With `stream: true` the answer is a stream of server-sent events."""
        record = RequestRecord(service.metrics, ENDPOINT, request_id(request.scope))
        try:
            return await _answer(service, request, record)
        except BaseException as error:
            record.finish(error=error)
            raise

    return routes


async def _answer(service: Service, http: Request, record: RequestRecord) -> Response:
    model = service.serving()
    body = await read_json(http, service.config.max_body.resolve(0))
    request = parse_completion(body)
    record.stream = request.stream
    _log_unknown_fields(service, body)
    service.check_model(request.model, model)
    job = await while_connected(http.receive, _prepare(service, model, request, record))
    deltas = _generate(job)
    if not request.stream:
        completion = await while_connected(http.receive, _collect(job, deltas))
        return JSONResponse(completion.model_dump())
    # The first delta decides between an error status and a stream.
    first = await while_connected(http.receive, anext(deltas))
    return EventStream(_events(job, first, deltas))


def _log_unknown_fields(service: Service, body: dict[str, object]) -> None:
    new = [name[:64] for name in unknown_fields(body) if name[:64] not in service.unknown_fields]
    if new and len(service.unknown_fields) < 1000:
        service.unknown_fields.update(new)
        logger.debug("request fields without a meaning here", extra={"fields": {"names": new}})


async def _prepare(service: Service, model: ServedModel, request: CompletionRequest, record: RequestRecord) -> Job:
    """Everything that depends on the model and can still be refused."""
    prompts = await model.codec.encode(parse(request.prompt), model.info.vocab_size, model.info.max_model_len)
    planned = plan_sequences(request, prompts, model.info)
    choices = [Choice(i, sequence.prompt, request, model.codec) for i, sequence in enumerate(planned)]
    return Job(
        service, model, request, prompts, planned, record, choices, f"cmpl-{uuid.uuid4().hex}", int(time.time())
    )  # fmt: skip


async def _generate(job: Job) -> AsyncGenerator[Delta, None]:
    """What the engine makes of the request, delta by delta, until every choice has ended."""
    try:
        with job.service.admission.permit(len(job.planned)):
            job.service.serving()  # the state may have changed while the prompt was tokenized
            async with aclosing(_follow(job)) as deltas:
                async for delta in deltas:
                    yield delta
    except BaseException as error:
        job.record.finish(error=error)
        raise


async def _follow(job: Job) -> AsyncGenerator[Delta, None]:
    engine = job.service.engine
    ids = engine.new_ids(len(job.planned))
    choices = dict(zip(ids, job.choices, strict=True))
    reasons: list[str] = []
    with engine.submit(_submits(job, ids)) as reply:
        job.record.start(sum(len(prompt.token_ids) for prompt in job.prompts))
        while len(reasons) < len(choices):
            update = await reply.next()
            choice = choices[update.sequence_id]
            if choice.finished:
                continue
            job.record.saw(update)
            delta = choice.apply(update)
            if delta.finish_reason is not None:
                reasons.append(delta.finish_reason)
                engine.abort([update.sequence_id])  # void unless a stop string ended it here
            yield delta
        job.record.finish(reasons)


def _submits(job: Job, ids: list[int]) -> list[Submit]:
    return [
        Submit(
            sequence_id=sequence_id, inputs=[TextInput(planned.prompt.token_ids)], sampling=planned.sampling,
            choice_index=planned.choice_index, priority=job.request.priority, arrival_s=job.record.arrival_s,
            mode=job.request.expert_mode,
        )
        for sequence_id, planned in zip(ids, job.planned, strict=True)
    ]  # fmt: skip


async def _collect(job: Job, deltas: AsyncGenerator[Delta, None]) -> Completion:
    """The whole answer."""
    whole = [Delta(choice.index) for choice in job.choices]
    texts: list[list[str]] = [[] for _ in whole]
    async with aclosing(deltas):
        async for delta in deltas:
            texts[delta.index].append(delta.text)
            whole[delta.index].tokens += delta.tokens
            if delta.finish_reason is not None:
                whole[delta.index].finish_reason = delta.finish_reason
                whole[delta.index].stop_reason = delta.stop_reason
    for delta, pieces in zip(whole, texts, strict=True):
        delta.text = "".join(pieces)
    return job.completion([_choice(job.request, delta) for delta in whole], job.usage())


async def _events(job: Job, first: Delta, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
    """The stream: chunks, the usage chunk if asked for, `[DONE]`; an error becomes an event before `[DONE]`."""
    options = job.request.stream_options
    with_usage = options is not None and options.include_usage
    running_usage = with_usage and options is not None and options.continuous_usage_stats

    def chunk(delta: Delta) -> bytes:
        return event(job.completion([_choice(job.request, delta)], job.usage() if running_usage else None))

    try:
        async with aclosing(deltas):
            if not first.is_empty:
                yield chunk(first)
            async for delta in deltas:
                if not delta.is_empty:
                    yield chunk(delta)
        if with_usage:
            yield event(job.completion([], job.usage()))
    except ApiError as error:
        yield event(ErrorBody.model_validate(error_body(error)))
    yield DONE


def _choice(request: CompletionRequest, delta: Delta) -> CompletionChoice:
    return CompletionChoice(
        index=delta.index,
        text=delta.text,
        logprobs=_logprobs(delta.tokens) if request.logprobs is not None else None,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
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
    for text, logprob in [*token.top, (token.text, token.logprob)]:
        top.setdefault(text, logprob)
    return top
