"""Many cheap HTTP clients in one process: raw sockets, one request each, some of whom leave."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, Literal

TIMEOUT_S = 300.0

Kind = Literal["answered", "refused", "left", "failed", "broken"]
"""`failed`: an error after the first byte, or a status of 500; `broken`: the connection ended before the answer did."""


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: Kind
    status: int = 0
    first_byte_s: float = 0.0
    """From sending to the status line."""
    tokens: int = 0
    """That reached the client."""
    text: str = ""
    retry_after: str | None = None
    detail: str = ""


async def ask(port: int, body: dict[str, Any], *, leave_after: int | None = None) -> Outcome:
    """POST /v1/completions with `body`; leave a stream after so many tokens, or an answer after as many tenths of a
    second."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
            try:
                return await _ask(reader, writer, body, leave_after)
            finally:
                writer.close()
    except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
        return Outcome("broken", detail=repr(error))


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any], leave_after: int | None
) -> Outcome:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n"
    began_s = time.monotonic()
    writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + content)
    stream = bool(body.get("stream"))
    try:
        wait_s = leave_after / 10 if leave_after is not None and not stream else None
        line = await asyncio.wait_for(reader.readuntil(b"\r\n"), wait_s)
    except TimeoutError:
        return Outcome("left")
    first_byte_s = time.monotonic() - began_s
    status = int(line.split()[1])
    headers = dict(h.lower().split(b": ", 1) for h in (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n") if h)
    if status == 200 and stream:
        return await _follow(reader, first_byte_s, leave_after)
    answer = json.loads(_unchunked(await reader.read(), headers))
    if status == 200:
        tokens, text = answer["usage"]["completion_tokens"], answer["choices"][0]["text"]
        return Outcome("answered", status, first_byte_s, tokens, text)
    kind: Kind = "refused" if status in (429, 503) else "failed"
    retry_after = headers.get(b"retry-after", b"").decode() or None
    return Outcome(kind, status, first_byte_s, retry_after=retry_after, detail=answer["error"]["code"])


async def _follow(reader: asyncio.StreamReader, first_byte_s: float, leave_after: int | None) -> Outcome:
    tokens, text = 0, ""
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]\n":
            return Outcome("answered", 200, first_byte_s, tokens, text)
        event = json.loads(line[6:])
        if "error" in event:
            return Outcome("failed", 200, first_byte_s, tokens, detail=event["error"]["code"])
        tokens += 1
        text += event["choices"][0]["text"]
        if leave_after is not None and tokens >= leave_after:
            return Outcome("left", 200, first_byte_s, tokens)
    return Outcome("broken", 200, first_byte_s, tokens, detail="the stream ended without [DONE]")


def _unchunked(body: bytes, headers: dict[bytes, bytes]) -> bytes:
    if headers.get(b"transfer-encoding") != b"chunked":
        return body
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        whole, body = whole + body[:length], body[length + 2 :]
    return whole
