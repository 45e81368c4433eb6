"""The ASGI application: routes, error bodies, the published description. Owns nothing; everything is in `Service`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from expertd_server import __version__
from expertd_server.auth import Authentication, KeyRing
from expertd_server.chat_schemas import ChatRequest
from expertd_server.envelope import Envelope
from expertd_server.errors import ApiError, as_api_error, error_response
from expertd_server.fields import Body
from expertd_server.responses_schemas import ResponsesRequest
from expertd_server.routes import chat, completions, models, operator, ops, responses, tokenize
from expertd_server.routes.operator import BudgetRequest
from expertd_server.routes.tokenize import DetokenizeRequest, TokenizeRequest
from expertd_server.schemas import CompletionRequest
from expertd_server.service import Service

BODIES: tuple[type[Body], ...] = (
    CompletionRequest, ChatRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest, BudgetRequest,
)  # fmt: skip
"""What routes read from request bodies themselves, so that FastAPI does not know of it."""


def create_app(service: Service, keys: KeyRing) -> FastAPI:
    """The application that serves `service` to who has one of `keys`, wrapped in its envelope."""
    app = FastAPI(
        title="expertd", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        exception_handlers={ApiError: _refuse, HTTPException: _refuse},
    )  # fmt: skip
    paths: dict[str, set[str]] = {}
    for module in (completions, chat, responses, tokenize, models, ops, operator):
        router = module.router(service)
        app.include_router(router)
        for route in router.routes:
            assert isinstance(route, APIRoute)
            paths.setdefault(route.path, set()).update(route.methods or ())
    service.metrics.serve_routes(paths, service.engine.buffered_tokens)
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]  # FastAPI's own way to extend it
    _wrap(app, service, keys)
    return app


def _wrap(app: FastAPI, service: Service, keys: KeyRing) -> None:
    """Middleware, innermost first: whatever is refused still gets its id, is counted, and can be read by a browser."""
    config = service.config
    app.add_middleware(Authentication, keys=keys, public_metrics=config.public_metrics)
    app.add_middleware(Envelope, metrics=service.metrics)
    if config.cors_origin is not None:
        app.add_middleware(
            CORSMiddleware, allow_origins=[origin.strip() for origin in config.cors_origin.split(",")],
            allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["x-request-id", "openai-processing-ms", "retry-after", "x-should-retry"],
        )  # fmt: skip


async def _refuse(request: Request, error: Exception) -> Response:
    mapped = as_api_error(error, f"{request.method} {request.url.path}")
    if mapped.status == 499:
        raise mapped  # nobody is left to answer: the envelope counts it
    return error_response(mapped)


def _description(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description with the bodies that the routes parse themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = schema["components"]["schemas"]
        for kind in BODIES:
            body = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(body.pop("$defs", {}))
            schemas[kind.__name__] = body
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own refusal of parameters, which none can meet here
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
