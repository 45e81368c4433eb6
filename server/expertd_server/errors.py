"""Everything a client can be told went wrong, and the one place that turns exceptions into OpenAI error bodies.

Raise these anywhere on the request path; `as_api_error` maps whatever else escapes. Messages name the value at fault
and what is allowed, never a path, a stack or more than `MAX_ECHO` characters of what the client sent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

logger = logging.getLogger("expertd.server")

MAX_ECHO = 200
"""Characters of a client's value that an error message repeats."""


class ApiError(Exception):
    """Base: an answer with an HTTP status and an OpenAI error body."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.headers: dict[str, str] = {}
        self.extra: dict[str, Any] = {}


class InvalidRequest(ApiError):
    """The client can fix it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """A field whose effect we cannot give, so silence would be a lie."""

    code = "unsupported_parameter"

    def __init__(self, param: str, why: str) -> None:
        super().__init__(f"{param} is not supported: {why}", param=param)


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer do not fit the window; both numbers are in the message and, for agents, in extra keys."""

    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, max_model_len: int, *, at_least: bool = False) -> None:
        count = f"at least {prompt_tokens}" if at_least else str(prompt_tokens)
        super().__init__(
            f"the prompt has {count} tokens and the context window holds {max_model_len}, the answer included: "
            f"send a prompt of at most {max_model_len - 1} tokens",
            param="prompt",
        )
        self.extra = {"n_prompt_tokens": prompt_tokens, "n_ctx": max_model_len}


class InvalidApiKey(ApiError):
    """No key, or one that is not in force."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers["www-authenticate"] = "Bearer"


class KeyLacksScope(ApiError):
    """The key is good, but not for this."""

    status = 403
    type = "permission_error"
    code = "insufficient_permissions"


class NotFound(InvalidRequest):
    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"

    def __init__(self, model: str, *served: str) -> None:
        """`served`: all names of what there is."""
        names = ", also called ".join(map(repr, dict.fromkeys(served)))
        super().__init__(f"the model {clip(model)!r} does not exist: this server serves {names}", param="model")


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"


class RequestTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the request body is larger than the {limit_bytes} bytes allowed")
        self.headers["connection"] = "close"  # the rest of the body is not read


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class RateLimited(ApiError):
    """This key has as much under way as one key may; others are served."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: int | None) -> None:
        super().__init__(message)
        self.headers.update(_retry(retry_after_s))


class Unavailable(ApiError):
    """The server cannot take the request now. `retry_after_s` None: trying again cannot help."""

    status = 503
    code = "server_is_overloaded"

    def __init__(
        self, message: str, *, code: str | None = None, retry_after_s: int | None = 1, bound: str = "queue_full"
    ) -> None:
        """`bound` says to the metrics which of the server's bounds an overload has met."""
        super().__init__(message, code=code)
        self.bound = bound
        self.headers.update(_retry(retry_after_s))


def _retry(after_s: int | None) -> dict[str, str]:
    """Headers that say when to try again; None: trying again cannot help."""
    return {"x-should-retry": "false"} if after_s is None else {"retry-after": str(after_s)}


class Draining(Unavailable):
    """The server is shutting down; another one behind the same address may answer."""

    code = "draining"

    def __init__(self) -> None:
        super().__init__("the server is shutting down and takes no new requests", retry_after_s=5)
        self.headers["connection"] = "close"


class EngineDead(Unavailable):
    """The engine process ended; the supervisor is starting another."""

    code = "engine_dead"

    def __init__(self, message: str = "the engine process ended while it worked on this request") -> None:
        super().__init__(message, retry_after_s=5)


class EngineFault(ApiError):
    """The engine ended this sequence with an error of its own."""

    code = "engine_error"


class ClientDisconnected(ApiError):
    """Nobody is left to read the answer: for the log and the metrics, never sent."""

    status = 499
    code = "client_disconnected"


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer that is not 2xx, and of an error event inside a stream."""

    error: ErrorDetail


def clip(value: object) -> str:
    """`value` as text, no longer than `MAX_ECHO` characters."""
    text = str(value)
    return text if len(text) <= MAX_ECHO else text[:MAX_ECHO] + "…"


def as_api_error(error: BaseException, asked_for: str = "") -> ApiError:
    """Any exception as the answer it stands for. What is not ours is a bug: logged here, opaque to the client.
    `asked_for` is the method and path, where they are known."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return _from_router(error, asked_for)
    logger.error("unexpected error while handling a request", exc_info=error)
    return ApiError("the server met an unexpected error; its log has the details")


def _from_router(error: HTTPException, asked_for: str) -> ApiError:
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        mapped: ApiError = MethodNotAllowed(f"this route does not take that method: allowed is {allowed or 'none'}")
    elif error.status_code == 404:
        mapped = NotFound(f"there is no route {clip(asked_for)!r}: /openapi.json lists all that there are")
    else:
        mapped = InvalidRequest(clip(error.detail))
        mapped.status = error.status_code
    mapped.headers.update(error.headers or {})
    return mapped


def error_body(error: ApiError) -> dict[str, Any]:
    """The OpenAI error object, for a response or for an event inside a stream."""
    detail = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {"error": {**detail, **error.extra}}


def error_response(error: ApiError) -> JSONResponse:
    """The whole answer: status, body and headers."""
    return JSONResponse(error_body(error), error.status, headers=error.headers)


def declared(*statuses: int) -> Mapping[int | str, dict[str, Any]]:
    """`responses=` of a route: these statuses answer with an error body."""
    meanings = {
        400: "Invalid request", 401: "No valid API key", 403: "The key may not do this", 404: "Not found",
        405: "Method not allowed", 413: "Body too large", 415: "Not application/json",
        429: "Too much under way for this key", 500: "Internal error", 503: "Not able to take requests now",
    }  # fmt: skip
    return {status: {"model": ErrorBody, "description": meanings[status]} for status in statuses}


def declared_generation() -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route that generates: whole or as a stream, or any error that there is."""
    stream: dict[str, dict[str, Any]] = {"text/event-stream": {}}  # no schema: descriptions have none for events
    answer = {"description": "The whole answer, or with `stream: true` server-sent events", "content": stream}
    return {200: answer, **declared(400, 401, 404, 413, 415, 429, 500, 503)}
