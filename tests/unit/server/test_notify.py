"""What systemd hears: ready once it serves, the beat while it is well, stopping; and nothing without being asked."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from expertd_server import notify
from expertd_server.notify import Notifier
from expertd_server.service import Service


class Systemd:
    """The socket that NOTIFY_SOCKET names."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.settimeout(10)

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def hears(self) -> str:
        return self._socket.recv(4096).decode()

    def hears_nothing(self) -> bool:
        return not select.select([self._socket], [], [], 0)[0]


def service(state: str, heard_s: float = 0.0) -> Any:
    return SimpleNamespace(state=state, stage="load", progress=0.5, engine=SimpleNamespace(heard_s=heard_s))


async def following(notifier: Notifier, act: Callable[[], None]) -> None:
    """Run `act` in a thread while the notifier follows."""
    task = asyncio.create_task(notifier.run())
    try:
        await asyncio.to_thread(act)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_each_state_is_told_once_and_ready_only_when_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "LOOK_S", 0.001)
    with Systemd(tmp_path) as systemd:
        observed = service("loading")
        environment = {"NOTIFY_SOCKET": systemd.address, "HOME": "/"}
        notifier = Notifier(cast(Service, observed), environment)
        assert environment == {"HOME": "/"}, "a child would speak in our name"

        def act() -> None:
            assert systemd.hears() == "STATUS=loading: load, 50%"
            observed.state = "ready"
            assert systemd.hears() == "READY=1\nSTATUS=ready"
            observed.state = "draining"
            assert systemd.hears() == "STOPPING=1\nSTATUS=draining"

        asyncio.run(following(notifier, act))
        assert systemd.hears_nothing()


def test_the_watchdog_hears_a_beat_unless_an_engine_that_serves_is_silent(tmp_path: Path) -> None:
    with Systemd(tmp_path) as systemd:
        observed = service("ready", heard_s=100.0)
        notifier = Notifier(cast(Service, observed), {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "20000000"})
        notifier.tick(101.0)
        assert [systemd.hears(), systemd.hears()] == ["READY=1\nSTATUS=ready", "WATCHDOG=1"]
        notifier.tick(110.0)
        assert systemd.hears_nothing(), "half of what systemd waits has not passed"
        notifier.tick(111.0)
        assert systemd.hears() == "WATCHDOG=1"
        notifier.tick(100.0 + notify.SILENCE_S)
        assert systemd.hears_nothing(), "the engine is silent"
        observed.state = "engine_dead"
        notifier.tick(200.0)
        assert [systemd.hears(), systemd.hears()] == ["STATUS=engine_dead", "WATCHDOG=1"], "it is being started again"


def test_without_systemd_nothing_is_said_and_a_socket_that_is_gone_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(Notifier(cast(Service, service("ready")), {}).run())
    assert not caplog.records
    asyncio.run(Notifier(cast(Service, service("ready")), {"NOTIFY_SOCKET": str(tmp_path / "gone")}).run())
    assert caplog.messages == ["systemd hears nothing"]
