"""Requests of every kind against a daemon, so that every metric has something to count."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

PROMPTS = ("Once upon a time", "The capital of France is", "Water boils at", "To make a cup of tea, you first")
SYSTEM = "You are a helpful assistant who answers in few words, and never says more than was asked for. " * 3


def completion(http: httpx.Client, number: int) -> None:
    prompt = PROMPTS[number % len(PROMPTS)]
    http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 24, "ignore_eos": True, "seed": number})


def conversation(http: httpx.Client, number: int) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"What is {number} plus one?"}]
    body = {"messages": messages, "max_tokens": 24, "stream": True, "stop": ["\n\n"]}
    with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        for _ in stream.iter_lines():
            pass


def leaving(http: httpx.Client, number: int) -> None:
    """A client that does not wait for the end of its stream."""
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 200, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())


def refused(http: httpx.Client, number: int) -> None:
    http.post("/v1/completions", json={"prompt": "a", "max_tokens": -number - 1})


KINDS: tuple[Callable[[httpx.Client, int], None], ...] = (completion, conversation, leaving, refused)


@contextmanager
def load(url: str, threads: int = 4) -> Iterator[None]:
    """Each thread sends one request after the other, of all kinds in turn, while the block runs."""
    over = threading.Event()

    def work(offset: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as http:
            number = offset
            while not over.is_set():
                KINDS[number % len(KINDS)](http, number)
                number += 1

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        over.set()
        for worker in workers:
            worker.join()


def scrapes(url: str, seconds: float, every_s: float = 2.0) -> Iterator[tuple[float, str]]:
    """(time, text of /metrics), again and again."""
    with httpx.Client(base_url=url, timeout=30) as http:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            yield time.time(), http.get("/metrics").text
            time.sleep(every_s)
