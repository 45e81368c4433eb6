"""What wraps every answer: the request id, the processing time, HTTP metrics, and the last resort for errors.

Pure ASGI: a middleware that runs the application in another task would hide disconnects from it. Once an answer has
begun, no second one is sent.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertd_server.auth import PUBLIC_PATHS
from expertd_server.errors import ClientDisconnected, as_api_error, error_response
from expertd_server.metrics import ENDPOINTS, Metrics

logger = logging.getLogger("expertd.requests")

MAX_ID_CHARS = 128
_KEY = "expertd.request_id"
_UNCOUNTED = frozenset({"/metrics", "/metrics/"})
"""Routes that do not count themselves."""

_POLLED = frozenset({"/status", "/experts"})
"""What is asked again and again, and is worth a line only where it fails. Probes never are."""

_METHODS = ("GET", "POST", "PUT", "HEAD", "OPTIONS")


def request_id(scope: Mapping[str, Any]) -> str:
    """The id that names this request in the answer's header and in the log. Never a key to anything."""
    return str(scope[_KEY])


def clean_id(given: str) -> str:
    """A client's own id, made harmless: characters that no log or header minds, at most 128; else a new one."""
    return re.sub(r"[^A-Za-z0-9._:-]", "", given[:1024])[:MAX_ID_CHARS] or uuid.uuid4().hex


class Envelope:
    """Owner of one HTTP exchange from the first to the last byte."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[_KEY] = clean_id(Headers(scope=scope).get("x-request-id", ""))
        started_s, status = time.monotonic(), 0

        async def send_wrapped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = scope[_KEY]
                headers["openai-processing-ms"] = str(int((time.monotonic() - started_s) * 1000))
            await send(message)

        route = self._metrics.route_of(scope["path"])
        with self._metrics.http_in_flight.labels(route).track_inprogress():
            try:
                await self._app(scope, receive, send_wrapped)
            except ClientDisconnected:
                status = ClientDisconnected.status
            except Exception as error:  # the top of every request: whatever it is, the client must get our error body
                mapped = as_api_error(error)
                if status:  # begun already: all that is left is to break it off, so that it cannot pass for whole
                    raise
                await error_response(mapped)(scope, receive, send_wrapped)
            finally:
                self._count(scope, route, status or ClientDisconnected.status, time.monotonic() - started_s)

    def _count(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        let_in = "route" in scope  # or refused for want of a key
        if route in _UNCOUNTED and let_in:
            return
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_requests.labels(route, method, str(status)).inc()
        told_elsewhere = route in ENDPOINTS or route in PUBLIC_PATHS or (route in _POLLED and status < 400)
        if not (told_elsewhere and let_in):
            _log(scope, {"route": route, "method": method, "status": status, "total_ms": round(seconds * 1000, 3)})


def _log(scope: Scope, fields: Mapping[str, object]) -> None:
    """The line of a request that generated nothing; those that reach an endpoint have `RequestRecord`'s."""
    logger.info("http", extra={"fields": {"request_id": scope[_KEY], **fields}})
