"""Server-sent events, and the race between a request's work and its client going away.

`while_connected` is the only reader of the ASGI receive channel once the body has been read; what it runs is
cancelled when the client leaves, so that every `finally` on the way (abort, permit, metrics) runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from expertd_server.errors import ApiError, ClientDisconnected, ErrorBody, error_body

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
WRITE_TIMEOUT_S = 60.0
"""Seconds a client may leave its connection full. One that never reads would otherwise keep its room for ever."""


def event(payload: BaseModel) -> bytes:
    """One event holding `payload` as JSON on one line."""
    return b"data: " + payload.model_dump_json().encode() + b"\n\n"


def named_event(name: str, payload: Mapping[str, Any]) -> bytes:
    """One event with a name of its own."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(payload) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """An error inside a stream that has begun."""
    return event(ErrorBody.model_validate(error_body(error)))


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, or ClientDisconnected after cancelling it because the client went away first."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected("the client closed the connection")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A `text/event-stream` answer. Owns `events`: closes them when they end, when the client leaves, and on error.

    After `keep_alive_s` of silence (0: never) a comment goes out, so that nobody between here and the client takes the
    connection for dead.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], keep_alive_s: float) -> None:
        self.events = events
        self._keep_alive_s = keep_alive_s
        self._sent_s = 0.0
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        except ClientDisconnected:
            return

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self.events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            pulse = asyncio.ensure_future(self._keep_alive(send)) if self._keep_alive_s else None
            try:
                async for chunk in self.events:
                    await self._send_piece(send, chunk)
            finally:
                if pulse is not None:
                    pulse.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        self._sent_s = time.monotonic()
        while True:
            silent_s = time.monotonic() - self._sent_s
            if silent_s >= self._keep_alive_s:
                await self._send_piece(send, KEEP_ALIVE)
            else:
                await asyncio.sleep(self._keep_alive_s - silent_s)

    async def _send_piece(self, send: Send, piece: bytes) -> None:
        self._sent_s = time.monotonic()
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError:
            raise ClientDisconnected(f"the client read nothing for {WRITE_TIMEOUT_S:g} seconds") from None
