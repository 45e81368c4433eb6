"""A stream that nobody reads is given up, and whatever it held with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from expertd_server import sse


def test_a_client_that_stays_but_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "WRITE_TIMEOUT_S", 0.01)
    closed = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.append(True)

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def full(message: Message) -> None:
        if message["type"] == "http.response.body":
            await never()

    asyncio.run(asyncio.wait_for(sse.EventStream(events(), 0)({"type": "http"}, never, full), 10))
    assert closed
