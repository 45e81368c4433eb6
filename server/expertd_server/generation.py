"""One request for text on its way through the engine, whatever its endpoint: read, plan, admit, submit, follow, end.

Whatever can be refused is refused before the first byte, for streams too: an answer begins when the engine has sent
something. `generate` owns the request while the engine works on it: permit, sequences, record; it ends all three
however it ends. A `Wording` puts what comes out into the endpoint's own objects.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Set
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from expertd_engine.messages import ExpertMode, Finished, SequenceStats, Submit, TextInput
from expertd_server.admission import BodyShare, Permit
from expertd_server.auth import owner
from expertd_server.body import read_json
from expertd_server.choices import Choice, Delta, PlannedSequence, plan_sequences
from expertd_server.constraints import Demand, demanded
from expertd_server.detokenize import Decode
from expertd_server.engine_client import Patience
from expertd_server.errors import ApiError
from expertd_server.prompts import EncodedPrompt
from expertd_server.records import RequestRecord
from expertd_server.schemas import ExpertUsage, GenerationRequest, PromptTokensDetails, Usage
from expertd_server.service import ServedModel, Service
from expertd_server.sse import EventStream, while_connected

logger = logging.getLogger("expertd.server")

AnyRequest = TypeVar("AnyRequest", bound=GenerationRequest)
Plan = TypeVar("Plan")


class Wording(Protocol):
    """How one endpoint says what the engine made of a request. Belongs to one request."""

    def whole(self, choices: list[Delta]) -> BaseModel:
        """The answer to a request that does not stream: all of each choice in one delta."""

    def events(self, delta: Delta) -> Iterable[bytes]:
        """What a stream shows of one delta; never called after `end` or `failure`."""

    def end(self) -> Iterable[bytes]:
        """What ends a stream."""

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """What ends a stream that has begun and cannot go on."""


@dataclass(slots=True)
class Job:
    """One request on its way: what was asked, by which model, and what has become of it so far."""

    service: Service
    model: ServedModel
    request: GenerationRequest
    prompts: list[EncodedPrompt]
    planned: list[PlannedSequence]
    record: RequestRecord
    choices: list[Choice]
    created: int
    stats: list[SequenceStats] = field(default_factory=list)
    """Of the sequences that have ended."""

    def usage(self) -> Usage:
        """So far."""
        prompt = sum(len(p.token_ids) for p in self.prompts)
        completion = sum(choice.completion_tokens for choice in self.choices)
        expert = self._expert_usage() if self.request.include_expert_usage else None
        return Usage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_tokens()), expert=expert,
        )  # fmt: skip

    def _cached_tokens(self) -> int:
        """Prompt tokens that no choice had to compute, each prompt once."""
        n = self.request.n
        by_prompt = (self.choices[i : i + n] for i in range(0, len(self.choices), n))
        return sum(min(choice.cached_tokens for choice in choices) for choices in by_prompt)

    def _expert_usage(self) -> ExpertUsage:
        substituted = sum(s.substituted for s in self.stats)
        return ExpertUsage(
            hits=sum(s.expert_hits for s in self.stats),
            late=sum(s.expert_late for s in self.stats),
            misses=sum(s.expert_misses for s in self.stats),
            loaded_bytes=sum(s.loaded_bytes for s in self.stats),
            stall_ms=round(sum(s.stall_s for s in self.stats) * 1000, 3),
            substitutions=substituted,
            substituted_share=_ratio(substituted, sum(s.choices for s in self.stats)),
            substituted_mass=_ratio(
                sum(s.substituted_mass for s in self.stats), sum(s.virtual_tokens for s in self.stats)
            ),
        )

    def contract(self) -> tuple[ExpertMode, float]:
        """The mode, and what share of a token's gate weight other experts may answer for: none is exact mode."""
        config, request = self.service.config, self.request
        asked = request.max_substituted_mass
        limit = config.max_substituted_mass if asked is None else asked
        mode = request.expert_mode or config.expert_mode
        return ("exact", 1.0) if limit == 0 else (mode, limit)


async def read_and_plan(
    service: Service,
    http: Request,
    record: RequestRecord,
    parse: Callable[[object], AnyRequest],
    plan: Callable[[ServedModel, AnyRequest], Awaitable[Plan]],
) -> tuple[AnyRequest, Plan]:
    """The checked request and what `plan` makes of it. Its body counts until then. Raises ApiError."""
    model = service.serving()
    record.model = model.name
    with service.bodies.share() as share:
        request = await _read_request(service, http, record, parse, share)
        service.check_model(request.model, model)
        service.admission.require_room()
        return request, await while_connected(http.receive, plan(model, request))


async def _read_request(
    service: Service,
    http: Request,
    record: RequestRecord,
    parse: Callable[[object], AnyRequest],
    share: BodyShare,
) -> AnyRequest:
    body = await read_json(http, service.config.max_body.resolve(0), share)
    request = parse(body)
    record.stream = request.stream
    _log_unknown_fields(service, request.known_fields(), body)
    return request


def _log_unknown_fields(service: Service, known: Set[str], body: Mapping[str, Any]) -> None:
    new = [name[:64] for name in sorted(body.keys() - known) if name[:64] not in service.unknown_fields]
    if new and len(service.unknown_fields) < 1000:
        service.unknown_fields.update(new)
        logger.debug("request fields without a meaning here", extra={"fields": {"names": new}})


async def plan_job(
    service: Service,
    model: ServedModel,
    request: GenerationRequest,
    prompts: list[EncodedPrompt],
    record: RequestRecord,
    demand: Demand | None = None,
    decode: Decode | None = None,
) -> Job:
    """Everything that depends on the model and can still be refused. `demand` stands for what the request's own
    fields ask of the answer's form, and `decode` for the way that its tokens become text, if given."""
    service.admission.require_possible(len(prompts) * request.n)
    demand = demand or demanded(request.response_format, request.structured_outputs)
    if demand is not None:
        await service.grammars.check(demand.constraint, param=demand.param)
    words = request.bad_words
    bad_words = await asyncio.to_thread(model.codec.ids_of_words, words) if words else []
    planned = plan_sequences(request, prompts, model.info, bad_words, demand.constraint if demand else None)
    choices = [Choice(i, sequence.prompt, request, model.codec, decode) for i, sequence in enumerate(planned)]
    return Job(service, model, request, prompts, planned, record, choices, int(time.time()))


async def respond(http: Request, job: Job, wording: Wording) -> Response:
    """Run the job and answer, whole or as a stream."""
    deltas = generate(job, owner(http.scope))
    if not job.request.stream:
        choices = await while_connected(http.receive, _collect(job, deltas))
        return JSONResponse(wording.whole(choices).model_dump())
    # The first delta decides between an error status and a stream.
    first = await while_connected(http.receive, anext(deltas))
    return EventStream(_events(wording, first, deltas), job.service.config.sse_keep_alive_s)


async def generate(job: Job, key: str) -> AsyncGenerator[Delta, None]:
    """What the engine makes of a request of the owner `key`, delta by delta, until every choice has ended."""
    waiting = sum(len(planned.prompt.token_ids) for planned in job.planned)
    with job.record.closing(), job.service.admission.permit(len(job.planned), waiting, key) as permit:
        job.service.serving()  # the state may have changed while the prompt was tokenized
        async with aclosing(_follow(job, permit)) as deltas:
            async for delta in deltas:
                yield delta


async def _follow(job: Job, permit: Permit) -> AsyncGenerator[Delta, None]:
    engine = job.service.engine
    patience = Patience(job.service.config.max_queue_wait_s, permit.started)
    ids = engine.new_ids(len(job.planned))
    choices = dict(zip(ids, job.choices, strict=True))
    awaited = set(ids)
    reasons: list[str] = []
    with engine.submit(_submits(job, ids), patience) as reply:
        job.record.start(sum(len(prompt.token_ids) for prompt in job.prompts))
        while awaited:
            update = await reply.next()
            choice = choices[update.sequence_id]
            if update.finished is not None:
                awaited.discard(update.sequence_id)
                job.stats.append(update.finished.stats)
                _log_fault(update.finished)
            if choice.finished:
                continue
            job.record.saw(update)
            delta = choice.apply(update)
            if delta.finish_reason is not None:
                reasons.append(delta.finish_reason)
                if update.finished is None:  # a stop string ended it, which the engine does not know
                    hear_end = job.request.include_expert_usage
                    engine.abort([update.sequence_id], hear_end=hear_end)
                    if not hear_end:
                        awaited.discard(update.sequence_id)
            yield delta
        job.record.finish(reasons)


def _log_fault(end: Finished) -> None:
    """What clients are not told: it may name files."""
    if end.error is not None and not end.refused:
        logger.error("the engine gave a sequence up", extra={"fields": {"error": end.error}})


def _ratio(part: float, whole: float) -> float:
    return round(part / whole, 6) if whole else 0.0


def _submits(job: Job, ids: list[int]) -> list[Submit]:
    mode, limit = job.contract()
    return [
        Submit(
            sequence_id=sequence_id, inputs=[TextInput(planned.prompt.token_ids)], sampling=planned.sampling,
            choice_index=planned.choice_index, priority=job.request.priority, arrival_s=job.record.arrival_s,
            mode=mode, max_substituted_mass=limit, cache_salt=job.request.cache_salt,
        )
        for sequence_id, planned in zip(ids, job.planned, strict=True)
    ]  # fmt: skip


async def _collect(job: Job, deltas: AsyncGenerator[Delta, None]) -> list[Delta]:
    """All of each choice."""
    whole = [Delta(choice.index) for choice in job.choices]
    texts: list[list[str]] = [[] for _ in whole]
    async with aclosing(deltas):
        async for delta in deltas:
            texts[delta.index].append(delta.text)
            whole[delta.index].extend(delta)
    for delta, pieces in zip(whole, texts, strict=True):
        delta.text = "".join(pieces)
    return whole


async def _events(wording: Wording, first: Delta, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
    """The stream, to whichever end."""
    try:
        async with aclosing(deltas):
            for event in wording.events(first):
                yield event
            async for delta in deltas:
                for event in wording.events(delta):
                    yield event
        last = wording.end()
    except ApiError as error:
        last = wording.failure(error)
    for event in last:
        yield event
