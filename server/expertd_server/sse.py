"""Server-sent events, and the race between a request's work and its client going away.

`while_connected` is the only reader of the ASGI receive channel once the body has been read; what it runs is
cancelled when the client leaves, so that every `finally` on the way (abort, permit, metrics) runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from expertd_server.errors import ClientDisconnected

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event(payload: BaseModel) -> bytes:
    """One event holding `payload` as JSON on one line."""
    return b"data: " + payload.model_dump_json().encode() + b"\n\n"


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
    """A `text/event-stream` answer. Owns `events`: closes them when they end, when the client leaves, and on error."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.events = events
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
            async for chunk in self.events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
