"""POST /v1/responses: a stateless adapter. The request becomes a chat; the answer's parts become items and events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from expertd_server.chat_format import ChatPlan, MessagePiece, MessageReader, Thought
from expertd_server.choices import Delta
from expertd_server.errors import ApiError, InvalidRequest
from expertd_server.generation import Job, read_and_plan, respond
from expertd_server.records import RequestRecord
from expertd_server.responses_schemas import (
    CallItem,
    IncompleteDetails,
    InputDetails,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    Status,
    parse_response_request,
)
from expertd_server.routes.chat import plan_chat
from expertd_server.routes.generating import generating_router
from expertd_server.service import ServedModel, Service
from expertd_server.sse import named_event
from expertd_server.tool_calls import CallPiece, Text

ENDPOINT = "/v1/responses"


def router(service: Service) -> APIRouter:
    """The routes of this module, bound to `service`."""
    return generating_router(service, ENDPOINT, ResponsesRequest, ResponseObject, create_response)


async def create_response(service: Service, http: Request, record: RequestRecord) -> Response:
    """Answer a conversation in OpenAI's newer form. With `stream: true` the answer is a stream of named events."""
    request, (job, plan) = await read_and_plan(
        service, http, record, parse_response_request, lambda model, request: _plan(service, model, request, record)
    )
    return await respond(http, job, _Wording(job, request, plan))


async def _plan(
    service: Service, model: ServedModel, request: ResponsesRequest, record: RequestRecord
) -> tuple[Job, ChatPlan]:
    try:
        return await plan_chat(service, model, request.as_chat(), record)
    except InvalidRequest as error:
        for theirs, ours in (("messages", "input"), ("response_format", "text")):
            if error.param == theirs:
                error.param = ours
                if error.message.startswith(theirs):
                    error.message = ours + error.message.removeprefix(theirs)
        raise


Event = tuple[str, dict[str, Any]]
"""Name and fields, before it has its number."""


class _Output:
    """The items of one response, of which the last may be open. What changes is told as events."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._open = False

    def add(self, piece: MessagePiece) -> Iterator[Event]:
        if not self._open or not self._continues(piece):
            yield from self.close()
            yield from self._begin(piece)
        yield from self._extend(piece)

    def close(self, status: Status = "completed") -> Iterator[Event]:
        """End the open item, if there is one."""
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        if isinstance(item, CallItem):
            yield "response.function_call_arguments.done", {
                **self._place(), "name": item.name, "arguments": item.arguments,
            }  # fmt: skip
        else:
            part = item.content[0]
            yield f"response.{part.type}.done", {**self._place(), **_part_place(part), "text": part.text}
            yield "response.content_part.done", {**self._place(), "content_index": 0, "part": part.model_dump()}
        item.status = status
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item.model_dump()}

    def _continues(self, piece: MessagePiece) -> bool:
        item = self.items[-1]
        if isinstance(piece, CallPiece):
            return isinstance(item, CallItem) and piece.id is None
        return isinstance(item, MessageItem if isinstance(piece, Text) else ReasoningItem)

    def _begin(self, piece: MessagePiece) -> Iterator[Event]:
        self.items.append(_new_item(piece))
        self._open = True
        item = self.items[-1]
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": item.model_dump()}
        if isinstance(item, CallItem):
            return
        part: OutputText | ReasoningText
        if isinstance(item, MessageItem):
            part = OutputText()
            item.content.append(part)
        else:
            part = ReasoningText()
            item.content.append(part)
        yield "response.content_part.added", {**self._place(), "content_index": 0, "part": part.model_dump()}

    def _extend(self, piece: MessagePiece) -> Iterator[Event]:
        item = self.items[-1]
        if isinstance(item, CallItem) and isinstance(piece, CallPiece):
            item.arguments += piece.arguments
            if piece.arguments:
                yield "response.function_call_arguments.delta", {**self._place(), "delta": piece.arguments}
        elif not isinstance(item, CallItem) and not isinstance(piece, CallPiece):
            part = item.content[0]
            part.text += piece.text
            if piece.text:
                yield f"response.{part.type}.delta", {**self._place(), **_part_place(part), "delta": piece.text}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1].id, "output_index": len(self.items) - 1}


def _part_place(part: OutputText | ReasoningText) -> dict[str, Any]:
    return {"content_index": 0, **({"logprobs": []} if isinstance(part, OutputText) else {})}


def _new_item(piece: MessagePiece) -> Item:
    number = uuid.uuid4().hex
    if isinstance(piece, CallPiece):
        return CallItem(id=f"fc_{number}", call_id=piece.id or f"call_{number}", name=piece.name or "")
    return ReasoningItem(id=f"rs_{number}") if isinstance(piece, Thought) else MessageItem(id=f"msg_{number}")


class _Wording:
    """Response objects. A stream is a sequence of numbered, named events, from `response.created` to one that holds
    the whole response."""

    def __init__(self, job: Job, request: ResponsesRequest, plan: ChatPlan) -> None:
        self._job = job
        self._request = request
        self._id = f"resp_{uuid.uuid4().hex}"
        self._reader: MessageReader = plan.reader()
        self._output = _Output()
        self._ended: Delta | None = None
        self._number = 0

    def whole(self, choices: list[Delta]) -> ResponseObject:
        for _ in self._changes(choices[0]):
            pass
        return self._ending()

    def events(self, delta: Delta) -> Iterator[bytes]:
        if self._number == 0:
            beginning = self._response("in_progress")
            yield self._event("response.created", {"response": beginning})
            yield self._event("response.in_progress", {"response": beginning})
        for name, fields in self._changes(delta):
            yield self._event(name, fields)

    def end(self) -> Iterator[bytes]:
        ending = self._ending()
        yield self._event(f"response.{ending.status}", {"response": ending})

    def failure(self, error: ApiError) -> Iterator[bytes]:
        failed = self._response("failed")
        failed.error = ResponseError(code=error.code, message=error.message)
        yield self._event("response.failed", {"response": failed})

    def _changes(self, delta: Delta) -> Iterator[Event]:
        pieces = self._reader.feed(delta.text)
        if delta.finish_reason is not None:
            self._ended = delta
            pieces += self._reader.end()
        for piece in pieces:
            yield from self._output.add(piece)
        if delta.finish_reason is not None:
            if not self._output.items:
                yield from self._output.add(Text(""))
            yield from self._output.close("incomplete" if delta.finish_reason == "length" else "completed")

    def _ending(self) -> ResponseObject:
        cut = self._ended is not None and self._ended.finish_reason == "length"
        response = self._response("incomplete" if cut else "completed")
        response.incomplete_details = IncompleteDetails() if cut else None
        response.usage = self._usage()
        return response

    def _usage(self) -> ResponseUsage:
        usage = self._job.usage()
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens, expert=usage.expert,
        )  # fmt: skip

    def _response(self, status: Any) -> ResponseObject:
        asked = self._request
        return ResponseObject(
            id=self._id, created_at=self._job.created, status=status, instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens, metadata=asked.metadata, model=self._job.model.name,
            output=self._output.items, parallel_tool_calls=asked.parallel_tool_calls,
            reasoning=asked.reasoning.model_dump(), temperature=asked.temperature,
            text={"format": {"type": "text"} | asked.text.format.model_dump(by_alias=True, exclude_unset=True)},
            tool_choice=asked.tool_choice or "auto",
            tools=[tool.model_dump() for tool in asked.tools or ()], top_p=asked.top_p,
        )  # fmt: skip

    def _event(self, name: str, fields: Mapping[str, Any]) -> bytes:
        plain = {key: value.model_dump() if isinstance(value, BaseModel) else value for key, value in fields.items()}
        number, self._number = self._number, self._number + 1
        return named_event(name, {"type": name, "sequence_number": number, **plain})
