"""Reading a JSON body: content type, size and syntax are checked here, before any framework sees them."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request

from expertd_server.admission import BodyShare
from expertd_server.errors import ClientDisconnected, InvalidRequest, RequestTooLarge, UnsupportedMediaType, clip

READ_TIMEOUT_S = 60.0
"""Seconds between two pieces of a body, so that a client that stalls does not hold a connection for ever."""

_decoder = msgspec.json.Decoder()


async def read_json(request: Request, limit_bytes: int, share: BodyShare) -> Any:
    """The decoded body. NaN, infinities, lone surrogates, other encodings than UTF-8 and endless nesting are not JSON.

    Its bytes count in `share` as they come. Raises UnsupportedMediaType, RequestTooLarge, Unavailable, InvalidRequest
    or ClientDisconnected.
    """
    _check_content_type(request)
    raw = await _read(request, limit_bytes, share)
    try:
        return _decoder.decode(raw.removeprefix(b"\xef\xbb\xbf"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {clip(error)}", code="invalid_json") from None


def _check_content_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType(f"content type {clip(given)!r} is not supported: send application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed bodies are not supported: send the body as it is")


async def _read(request: Request, limit_bytes: int, share: BodyShare) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:18]) > limit_bytes:
        raise RequestTooLarge(limit_bytes)
    body = bytearray()
    more = True
    while more:
        message = await _receive(request)
        piece = message.get("body", b"")
        if len(body) + len(piece) > limit_bytes:
            raise RequestTooLarge(limit_bytes)
        share.add(len(piece))
        body += piece
        more = message.get("more_body", False)
    return bytes(body)


async def _receive(request: Request) -> Any:
    try:
        message = await asyncio.wait_for(request.receive(), READ_TIMEOUT_S)
    except TimeoutError:
        raise InvalidRequest(f"no more of the body came for {READ_TIMEOUT_S:g} seconds", code="timeout") from None
    if message["type"] == "http.disconnect":
        raise ClientDisconnected("the client closed the connection before its request was whole")
    return message
