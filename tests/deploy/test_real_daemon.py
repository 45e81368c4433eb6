"""The daemon as it is deployed: without a compiler, told to stop with streams under way."""

from __future__ import annotations

import concurrent.futures
import signal

import httpx
import pytest

from support.daemon import RunningDaemon, daemon
from support.demo import CACHE, demo_store

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

STREAMS = 16
FLAGS = ("--expert-budget", "50%", "--max-model-len", "512", "--cache-dir", str(CACHE), "--max-sequences", str(STREAMS))


def test_it_serves_where_nothing_can_be_compiled() -> None:
    demo_store("bf16")
    environment = {"CC": "/bin/false", "CXX": "/bin/false", "PATH": "/nowhere"}
    with daemon("demo", *FLAGS, environment=environment) as running:
        body = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
        answer = running.http.post("/v1/completions", json=body)
        assert "Paris" in answer.json()["choices"][0]["text"]
        engine = running.http.get("/version").json()["engine"]
    with daemon("demo", *FLAGS) as usual:
        assert usual.http.get("/version").json()["engine"]["kernels"] == engine["kernels"]


def _stream(running: RunningDaemon, number: int) -> str:
    body = {"prompt": f"{number} and", "max_tokens": 30, "ignore_eos": True, "stream": True}
    return httpx.post(running.url + "/v1/completions", json=body, timeout=120).text


def test_sixteen_streams_finish_before_it_ends() -> None:
    demo_store("bf16")
    with (
        daemon("demo", *FLAGS, "--drain-timeout-s", "100") as running,
        concurrent.futures.ThreadPoolExecutor(STREAMS) as pool,
    ):
        streams = [pool.submit(_stream, running, number) for number in range(STREAMS)]
        while running.metrics()["expertd_generation_tokens_total"] < STREAMS:
            pass
        running.process.send_signal(signal.SIGTERM)
        while running.http.get("/ready").json()["status"] != "draining":
            pass
        refused = running.http.post("/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        texts = [stream.result() for stream in streams]
        assert all('"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n") for text in texts)
        assert running.process.wait(300) == 0
