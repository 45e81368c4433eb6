"""Far more clients than there is room for: each is answered, or refused before its first byte and at once; the server
does as much useful work as without them. 10,000 connections that ask nothing stop nobody.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from faults.clients import Outcome, ask
from support.daemon import RunningDaemon, daemon
from support.demo import CACHE, PROMPTS
from support.running_server import Start

ROOM = 8
"""Sequences computed at once, and as many that wait."""
CLIENTS, REQUESTS = 200, 20
OVERLOAD = 4.0
CAPACITY_S = 30.0
TOKENS = 16
REST_S = 10.0


def body(rng: random.Random) -> dict[str, object]:
    return {
        "prompt": rng.choice(PROMPTS), "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
        "stream": rng.random() < 0.7,
    }  # fmt: skip


async def capacity(port: int) -> float:
    """Tokens a second that reach as many clients as are computed at once, each asking again when it is answered."""
    rng = random.Random(0)
    tokens = 0
    end_s = asyncio.get_running_loop().time() + CAPACITY_S

    async def client() -> None:
        nonlocal tokens
        while asyncio.get_running_loop().time() < end_s:
            outcome = await ask(port, body(rng))
            assert outcome.kind == "answered", outcome
            tokens += outcome.tokens

    await asyncio.gather(*(client() for _ in range(2 * ROOM)))
    return tokens / CAPACITY_S


async def overload(port: int, requests_per_s: float) -> list[tuple[float, Outcome]]:
    """What became of every request of every client, in the order in which they ended, and when each did."""
    rng = random.Random(1)
    ended: list[tuple[float, Outcome]] = []

    async def client() -> None:
        for _ in range(REQUESTS):
            await asyncio.sleep(rng.expovariate(requests_per_s / CLIENTS))
            leave_after = rng.randrange(1, TOKENS) if rng.random() < 0.1 else None
            outcome = await ask(port, body(rng), leave_after=leave_after)
            ended.append((asyncio.get_running_loop().time(), outcome))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return ended


def goodput(ended: Sequence[tuple[float, Outcome]]) -> float:
    """Tokens a second that reached clients while all of them were at it: neither the beginning nor the end counts."""
    middle = ended[len(ended) // 10 : len(ended) * 8 // 10]
    return sum(outcome.tokens for _, outcome in middle) / (middle[-1][0] - middle[0][0])


@contextmanager
def own_processors() -> Iterator[list[float]]:
    """How many processors this process, which plays all the clients, kept busy during the block."""
    used: list[float] = []
    began_s, cpu_s = time.monotonic(), time.process_time()
    yield used
    used.append((time.process_time() - cpu_s) / (time.monotonic() - began_s))


def left_by_clients(possible: float, few: float, many: float) -> float:
    """What of `possible`, measured beside clients that kept `few` processors busy, is possible beside `many`: clients
    elsewhere would take nothing.
    """
    processors = len(os.sched_getaffinity(0))
    return possible * (processors - many) / (processors - few)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@pytest.mark.acceptance
def test_four_times_as_much_as_there_is_room_for() -> None:
    flags = ("--max-sequences", str(ROOM), "--max-waiting", str(ROOM), "--cache-dir", str(CACHE))
    with daemon("demo", *flags, "--max-model-len", "512") as running:
        port = int(running.url.rpartition(":")[2])
        with own_processors() as few:
            possible = asyncio.run(capacity(port))
        with own_processors() as many:
            ended = asyncio.run(overload(port, OVERLOAD * possible / TOKENS))
        left = left_by_clients(possible, *few, *many)
        outcomes = [outcome for _, outcome in ended]
        report(outcomes, goodput(ended), possible, left)
        kinds = Counter(outcome.kind for outcome in outcomes)
        refused = [outcome for outcome in outcomes if outcome.kind == "refused"]
        assert kinds.keys() <= {"answered", "refused", "left"}, [o for o in outcomes if o.kind in ("failed", "broken")]
        assert len(outcomes) == CLIENTS * REQUESTS and refused
        assert all(outcome.retry_after is not None for outcome in refused)
        assert percentile([outcome.first_byte_s for outcome in refused], 0.99) < 0.25
        assert goodput(ended) >= 0.9 * left
        assert_at_rest(running)


def report(outcomes: list[Outcome], done: float, possible: float, left: float) -> None:
    kinds = Counter(outcome.kind for outcome in outcomes)
    refusals = [outcome.first_byte_s for outcome in outcomes if outcome.kind == "refused"]
    print(
        f"\n{len(outcomes)} requests of {CLIENTS} clients: {dict(kinds)}; refusals p50 "
        f"{percentile(refusals, 0.5) * 1000:.0f} ms, p99 {percentile(refusals, 0.99) * 1000:.0f} ms; "
        f"{done:.1f} tokens/s of {possible:.1f} possible, {left:.1f} with the clients' own processor time taken off"
    )


def assert_at_rest(running: RunningDaemon) -> None:
    """Soon: who left last is noticed at the next write or read."""
    until_s = time.monotonic() + REST_S
    while any((metrics := running.fresh_metrics())[f"expertd_requests_{state}"] for state in ("running", "waiting")):
        assert time.monotonic() < until_s, metrics


HOLD = """
import resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
connections = []
for number in range(int(sys.argv[2])):
    connections.append(socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60))
    if number % 2:
        connections[-1].sendall(b"POST /v1/completions HTTP/1.1\\r\\nhost: x\\r\\n")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def idle_connections(port: int, count: int) -> Iterator[None]:
    """Half of them have begun a request that they never end. They are another process's."""
    command = [sys.executable, "-c", HOLD, str(port), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        yield
        holder.stdin.close()


@pytest.mark.slow
def test_10000_idle_connections_stop_nobody(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 11_000:
        pytest.skip(f"this process may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        server = start()
        with idle_connections(server.port, 10_000):
            assert server.http.get("/live").status_code == 200
            assert server.complete(max_tokens=3).status_code == 200
        assert server.complete(max_tokens=3).status_code == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
