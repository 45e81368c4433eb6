"""The ASGI application: routes, error bodies, the published description. Owns nothing; everything is in `Service`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from expertd_server import __version__
from expertd_server.envelope import Envelope
from expertd_server.errors import ApiError, as_api_error, error_response
from expertd_server.routes import completions, models, ops
from expertd_server.schemas import CompletionRequest
from expertd_server.service import Service


def create_app(service: Service) -> FastAPI:
    """The application that serves `service`, wrapped in its envelope."""
    app = FastAPI(
        title="expertd", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        exception_handlers={ApiError: _refuse, HTTPException: _refuse},
    )  # fmt: skip
    for module in (completions, models, ops):
        app.include_router(module.router(service))
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]  # FastAPI's own way to extend it
    app.add_middleware(Envelope, metrics=service.metrics)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    mapped = as_api_error(error)
    if mapped.status == 499:
        raise mapped  # nobody is left to answer: the envelope counts it
    return error_response(mapped)


def _description(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description with the bodies that the routes parse themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        body = CompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas = schema["components"]["schemas"]
        schemas.update(body.pop("$defs", {}))
        schemas[CompletionRequest.__name__] = body
        app.openapi_schema = schema
    return app.openapi_schema
