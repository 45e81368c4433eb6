"""A server process of its own: real signals, exit codes, and the log on standard error."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.fake_engine import WAIT_S

TESTS = Path(__file__).parents[1]

PROGRAM = """
import asyncio, sys
from pathlib import Path
from expertd_engine.config import Config
from expertd_server import daemon, logs
from support.fake_engine import FakeLauncher, Script

async def main():
    listening = daemon.bind("127.0.0.1", 0)
    server = daemon.Daemon(Config(), listening, FakeLauncher(Path(sys.argv[1]), Script()))
    server.handle_signals()
    print(listening.getsockname()[1], flush=True)
    return await server.run()

logs.configure("info")
sys.exit(asyncio.run(main()))
"""


@pytest.fixture
def process(store: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(store)], cwd=TESTS, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        yield child
        child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_log_has_one_line_for_each_request(
    process: subprocess.Popen[str], number: signal.Signals
) -> None:
    assert process.stdout is not None
    url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    transport = httpx.HTTPTransport(retries=3)
    with httpx.Client(base_url=url, transport=transport, timeout=WAIT_S) as http:
        while http.get("/ready").status_code != 200:
            pass
        http.post("/v1/completions", json={"prompt": "a secret", "max_tokens": 2}, headers={"x-request-id": "mine"})
    process.send_signal(number)
    _, log = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert len(requests) == 1
    assert requests[0]["request_id"] == "mine"
    assert (requests[0]["prompt_tokens"], requests[0]["completion_tokens"]) == (8, 2)
    assert (requests[0]["status"], requests[0]["finish_reason"]) == (200, "length")
    assert requests[0]["expert_hits"] == 3
    assert "secret" not in log
