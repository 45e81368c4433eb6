"""Engines that die, hang or talk nonsense, a full temporary folder, a clock that jumps: the server goes on."""

from __future__ import annotations

import ast
import asyncio
import errno
import json
import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq

import expertd_server
from expertd_engine.errors import ResourceError
from expertd_engine.loop import Channel
from expertd_server.auth import NO_KEYS
from expertd_server.launcher import ChildFailed, Process
from expertd_server.supervisor import RestartPolicy
from support.daemon import RunningDaemon, daemon
from support.fake_engine import WAIT_S, FakeLauncher, Script
from support.running_server import CONFIG, Server, Start

# ---------------------------------------------------------------- a real engine is killed


def stream_to_its_end(url: str, speaks: threading.Barrier) -> tuple[list[str], float]:
    """The events of one endless stream, and when it was over."""
    body = {"prompt": "on and on", "max_tokens": 100, "ignore_eos": True, "stream": True, "temperature": 0}
    events: list[str] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if len(events) == 1:
                    speaks.wait(120)
    return events, time.monotonic()


def complete(running: RunningDaemon) -> str:
    body = {"prompt": "once more", "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    answer = running.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_an_engine_killed_under_load(tiny: Path) -> None:
    """Clients hear of it within two seconds, readiness flips, counters go on, the next answer is right.

    And when the server is killed, the engine ends by itself.
    """
    flags = ("--max-model-len", "128", "--threads", "1", "--expert-budget", "25%")
    with daemon(tiny, *flags) as running, ThreadPoolExecutor(8) as pool:
        expected = complete(running)
        before = running.fresh_metrics()
        speaks = threading.Barrier(9)
        clients: list[Future[tuple[list[str], float]]] = [
            pool.submit(stream_to_its_end, running.url, speaks) for _ in range(8)
        ]
        speaks.wait(120)
        killed_s = time.monotonic()
        os.kill(running.engine_pid(), signal.SIGKILL)
        for client in clients:
            events, ended_s = client.result()
            assert json.loads(events[-2])["error"]["code"] == "engine_dead" and events[-1] == "[DONE]"
            assert ended_s - killed_s < 2.0
        assert running.http.get("/ready").status_code == 503
        running.until_ready()
        assert complete(running) == expected
        after = running.fresh_metrics()
        assert after["expertd_engine_restarts_total"] == 1
        assert after["expertd_generation_tokens_total"] >= before["expertd_generation_tokens_total"] + 8
        fallen = {n for n, v in before.items() if n.endswith(("_total", "_count", "_sum")) and after[n] < v}
        assert not fallen
        engine = running.engine_pid()
        running.process.kill()
        running.process.wait()
        end_s = time.monotonic() + 10
        while Path(f"/proc/{engine}").exists():
            assert time.monotonic() < end_s, "the engine outlived its server"
            time.sleep(0.05)


# ---------------------------------------------------------------- an engine hangs

WEDGED = """
import sys, threading
from expertd_engine.__main__ import _tie_to_parent
from expertd_engine.loop import Channel
from expertd_engine.messages import Ready, Submit
from support.fake_engine import engine_info

def wedged_here():
    threading.Event().wait()

_tie_to_parent(int(sys.argv[2]))
channel = Channel(sys.argv[1])
channel.send(Ready(engine_info()))
while not isinstance(channel.receive(60.0), Submit):
    pass
wedged_here()
"""


class WedgingLauncher(FakeLauncher):
    """The first engine is a process that hangs at its first sequence; later ones are fake and well."""

    def __init__(self, store: Path) -> None:
        super().__init__(store)
        self.wedged: asyncio.subprocess.Process | None = None

    async def start_engine(self, store: Path, endpoint: str) -> Process:  # type: ignore[override]  # any process will do
        if self.wedged is None:
            tests = str(Path(__file__).parents[1])
            self.wedged = await asyncio.create_subprocess_exec(
                sys.executable, "-c", WEDGED, endpoint, str(os.getpid()), env={**os.environ, "PYTHONPATH": tests}
            )
            return self.wedged
        return await super().start_engine(store, endpoint)


def test_a_wedged_engine_leaves_its_stacks_and_is_replaced(
    text_store: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.running_server.WAIT_S", 120.0)  # the process imports what an engine imports
    server = Server(CONFIG, WedgingLauncher(text_store), NO_KEYS)
    try:
        server.until_ready()
        server.on_loop(lambda: setattr(server.daemon.supervisor, "_heartbeat_s", 0.5))
        assert server.complete().json()["error"]["code"] == "engine_dead"
        server.on_loop(lambda: setattr(server.daemon.supervisor, "_heartbeat_s", 30.0))
        server.launcher.wait_for_engine(1)
        server.until_ready()
        assert server.complete(max_tokens=1).status_code == 200
        assert "in wedged_here" in capfd.readouterr().err
    finally:
        server.close()


# ---------------------------------------------------------------- messages

NONSENSE = (b"", b"\xff" * 16, msgspec.msgpack.encode({"type": "Steps"}), msgspec.msgpack.encode([1, 2]))


@pytest.mark.parametrize("frame", NONSENSE)
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_nonsense_after_the_nth_message_costs_one_engine(start: Start, frame: bytes, after: int) -> None:
    server = start(Script(held=True))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete, max_tokens=50)
        server.engine.wait_for(lambda: bool(server.engine.submitted))
        server.engine.allow(after)
        server.engine.babble(frame)
        assert asked.result().json()["error"]["code"] == "engine_dead"
    server.launcher.wait_for_engine(2).allow(100)
    server.until_ready()
    assert server.complete(max_tokens=3).status_code == 200


@pytest.mark.parametrize("frame", NONSENSE)
def test_nonsense_from_the_server_is_an_error_of_the_codec(frame: bytes, tmp_path: Path) -> None:
    """Which ends the engine with a last word; it is never taken for something else."""
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.bind(f"ipc://{tmp_path}/s")
    channel = Channel(f"ipc://{tmp_path}/s")
    try:
        socket.send(frame)
        with pytest.raises(msgspec.DecodeError):
            channel.receive(WAIT_S)
    finally:
        channel.close()
        socket.close(0)
        context.term()


# ---------------------------------------------------------------- no room in the temporary folder


def no_room(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/expertd-1")


def test_a_full_temporary_folder_at_start_is_said(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(ready=False)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", no_room)
    server.launcher.store_ready.set()
    server.join()
    assert isinstance(server.error, ChildFailed)
    assert server.error.exit_code == ResourceError.exit_code
    assert "No space left on device: '/tmp/expertd-1'" in str(server.error)


def test_a_full_temporary_folder_at_a_restart_is_tried_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    patient = RestartPolicy(tries=10**6, first_delay_s=0.01, max_delay_s=0.01)
    server.on_loop(lambda: setattr(server.daemon.supervisor, "_policy", patient))
    with monkeypatch.context() as full:
        full.setattr(tempfile, "TemporaryDirectory", no_room)
        server.engine.crash()
        server.until(lambda: server.metrics().get('expertd_engine_restarts_total{reason="start"}', 0) >= 1)
        assert server.complete().json()["error"]["code"] == "engine_dead"
    server.launcher.wait_for_engine(2)
    server.until_ready()
    assert server.complete(max_tokens=1).status_code == 200


# ---------------------------------------------------------------- the clock


@pytest.mark.parametrize("step_s", [-365 * 86400.0, 365 * 86400.0])
def test_a_clock_that_jumps_disturbs_nobody(start: Start, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    server = start(Script(held=True), max_queue_wait_s=30.0, sse_keep_alive_s=15.0)
    real = time.time
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete, max_tokens=4)
        server.engine.wait_for(lambda: bool(server.engine.submitted))
        monkeypatch.setattr(time, "time", lambda: real() + step_s)
        server.engine.allow(100)
        answer = asked.result()
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
    later = server.complete(max_tokens=1).json()
    assert abs(later["created"] - (real() + step_s)) < 60, "only what is a date follows the clock"


def test_durations_come_from_the_monotonic_clock() -> None:
    """`time.time` is read where a date is wanted, and nowhere else."""
    root = Path(expertd_server.__file__).parents[2]
    users = {
        path.stem
        for path in [*root.glob("server/**/*.py"), *root.glob("engine/**/*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "time.time"
    }
    assert users <= {"generation", "service", "logs", "responses", "responses_format", "records", "chat"}, users
