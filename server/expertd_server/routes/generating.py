"""How every endpoint that generates stands in the API: one POST route, and one record for each of its requests."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from expertd_server.envelope import request_id
from expertd_server.errors import declared_generation
from expertd_server.fields import body_of
from expertd_server.records import RequestRecord
from expertd_server.schemas import GenerationRequest
from expertd_server.service import Service

Answer = Callable[[Service, Request, RequestRecord], Awaitable[Response]]
"""Answers one request, of which the record is kept; its name and docstring are the route's in the published API."""


def generating_router(
    service: Service, path: str, body: type[GenerationRequest], whole: type[BaseModel], answer: Answer
) -> APIRouter:
    """A router with one route, which reads a `body` and answers with a `whole`, or with a stream."""

    async def endpoint(request: Request) -> Response:
        record = RequestRecord(service.metrics, path, request_id(request.scope))
        with record.closing():
            return await answer(service, request, record)

    routes = APIRouter()
    routes.add_api_route(
        path, endpoint, methods=["POST"], name=answer.__name__, description=inspect.getdoc(answer),
        response_model=whole, responses=declared_generation(), openapi_extra=body_of(body),
    )  # fmt: skip
    return routes
