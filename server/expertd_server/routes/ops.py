"""What operators and probes ask: alive, ready, which version, which numbers. No route here reaches the engine."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client.exposition import choose_encoder

from expertd_engine.messages import EngineInfo
from expertd_server import __version__
from expertd_server.errors import declared
from expertd_server.service import Service

_METRICS = {"content": {"text/plain": {"schema": {"type": "string"}}}}
_STATE = {"description": "Not able to take requests now", "content": {"application/json": {}}}


def router(service: Service) -> APIRouter:
    """The routes of this module, bound to `service`."""
    routes = APIRouter()

    async def live() -> dict[str, str]:
        """The server process runs. Never depends on the engine."""
        return {"status": "ok"}

    async def ready() -> Response:
        """Requests are taken: 200, or 503 with the reason (loading, draining, engine_dead)."""
        return _readiness(service)

    async def metrics(request: Request) -> Response:
        """Prometheus metrics, as OpenMetrics where asked for."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(service.metrics.registry), media_type=content_type)

    async def version() -> dict[str, Any]:
        """Versions, numerics, fallbacks and budgets of what is running."""
        return _version(service)

    _add(routes, live, "/live", "/livez", "/ping")
    _add(routes, ready, "/ready", "/readyz", responses={503: _STATE})
    _add(routes, ready, "/health", "/v1/health", responses={503: _STATE})
    _add(routes, metrics, "/metrics", "/metrics/", responses={200: _METRICS, **declared(401)})
    _add(routes, version, "/version")
    return routes


def _add(routes: APIRouter, endpoint: Any, path: str, *aliases: str, **options: Any) -> None:
    """`path`, which /openapi.json shows, and other names for it, which it does not. All answer HEAD, as probes ask."""
    routes.add_api_route(path, endpoint, response_model=None, **options)
    routes.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)
    for alias in aliases:
        routes.add_api_route(alias, endpoint, methods=["GET", "HEAD"], response_model=None, include_in_schema=False)


def _readiness(service: Service) -> Response:
    if service.state == "ready":
        return JSONResponse({"status": "ready"})
    body: dict[str, Any] = {"status": service.state}
    if service.state == "loading":
        body |= {"stage": service.stage, "progress": round(service.progress, 4)}
    return JSONResponse(body, status_code=503)


def _version(service: Service) -> dict[str, Any]:
    body: dict[str, Any] = {"version": __version__, "status": service.state}
    if service.model is not None:
        shown = [name for name in EngineInfo.__struct_fields__ if name not in ("store_path", "pid")]
        body["model"] = service.model.name
        body["system_fingerprint"] = service.model.fingerprint
        body["engine"] = {name: getattr(service.model.info, name) for name in shown}
    return body
