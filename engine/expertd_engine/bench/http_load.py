"""Streams over HTTP against a running daemon, timed as a client sees them. Standard library alone."""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from expertd_engine.errors import EngineError

_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer. Times are seconds of one monotonic clock."""

    asked_s: float
    tokens_s: tuple[float, ...]
    """When each token came."""

    @property
    def ttft_s(self) -> float:
        return self.tokens_s[0] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        return [later - sooner for sooner, later in zip(self.tokens_s, self.tokens_s[1:], strict=False)]


def run_streams(port: int, prompts: Sequence[int], tokens: int, vocabulary: int, seed: int) -> list[Stream]:
    """Completions at once: random prompts of so many tokens each, `tokens` tokens of answer, greedy."""
    rng = random.Random(seed)
    drawn = [[rng.randrange(vocabulary) for _ in range(prompt)] for prompt in prompts]
    with ThreadPoolExecutor(len(drawn)) as pool:
        return list(pool.map(lambda ids: _stream(port, ids, tokens), drawn))


def get(port: int, path: str) -> tuple[int, str]:
    """Status and body of a GET; (0, reason) where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except OSError as error:
        return 0, str(error)
    finally:
        connection.close()


def _stream(port: int, prompt: Sequence[int], tokens: int) -> Stream:
    body = {
        "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "return_token_ids": True,
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    asked_s = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise EngineError(f"the daemon answered {response.status}: {response.read().decode(errors='replace')}")
        came: list[float] = []
        for line in response:
            came += [time.perf_counter()] * tokens_in(line)
    finally:
        connection.close()
    if len(came) != tokens:
        raise EngineError(f"a stream ended after {len(came)} of {tokens} tokens")
    return Stream(asked_s, tuple(came))


def tokens_in(line: bytes) -> int:
    """Tokens that one line of an event stream brings. Raises EngineError for an error event."""
    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
        return 0
    event = json.loads(line[6:])
    if "error" in event:
        raise EngineError(f"a stream broke off: {event['error']}")
    return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
