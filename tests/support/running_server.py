"""A real server on a loopback port, in a thread, with a fake engine behind it."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx

from expertd_engine.config import Config, Size
from expertd_server.auth import NO_KEYS, KeyRing
from expertd_server.daemon import Daemon, bind
from expertd_server.supervisor import RestartPolicy
from support.fake_engine import WAIT_S, FakeEngine, FakeLauncher, Script

QUICK_RESTARTS = RestartPolicy(tries=2, first_delay_s=0.01, max_delay_s=0.01)


class Server:
    """A running server: `http` talks to it, `script` says what its engine does."""

    def __init__(self, config: Config, launcher: FakeLauncher, keys: KeyRing) -> None:
        self._keys = keys
        self.launcher = launcher
        self.script = launcher.script
        self.code: int | None = None
        self.error: BaseException | None = None
        self._config = config
        self._listening = bind(config.host, 0)
        self.port: int = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=WAIT_S)
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server")
        self._thread.start()
        assert self._began.wait(WAIT_S)

    def _run(self) -> None:
        async def main() -> int:
            self._loop = asyncio.get_running_loop()
            self.daemon = Daemon(self._config, self._listening, self.launcher, QUICK_RESTARTS, self._keys)
            self._began.set()
            return await self.daemon.run()

        try:
            self.code = asyncio.run(main())
        except BaseException as error:
            self.error = error

    @property
    def engine(self) -> FakeEngine:
        return self.launcher.engines[-1]

    def signal(self) -> None:
        """As SIGTERM would."""
        self._loop.call_soon_threadsafe(self.daemon.stop)

    def on_loop(self, act: Callable[[], None]) -> None:
        """Run `act` on the server's event loop."""
        self._loop.call_soon_threadsafe(act)

    def join(self) -> None:
        """Until the server has ended."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the server did not end"

    def until(self, what: Callable[[], bool]) -> None:
        """Poll for something only the server knows. Raises AssertionError after `WAIT_S`."""
        end_s = time.monotonic() + WAIT_S
        while not what():
            assert time.monotonic() < end_s, "the server never got there"
            time.sleep(0.005)

    def until_ready(self) -> None:
        self.until(lambda: self.http.get("/ready").status_code == 200)

    def complete(self, **body: Any) -> httpx.Response:
        """POST /v1/completions, with a prompt unless `body` has one."""
        return self.http.post("/v1/completions", json={"prompt": "Hi", **body})

    def chat(self, **body: Any) -> httpx.Response:
        """POST /v1/chat/completions, with a message unless `body` has some."""
        return self.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], **body})

    def metrics(self) -> dict[str, float]:
        """All samples by name and labels, as the text format writes them."""
        lines = self.http.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}

    def close(self) -> None:
        self.http.close()
        self.signal()
        self.signal()
        self.join()


class Start(Protocol):
    """Start a server of one's own; `ready=False` does not wait for its engine."""

    def __call__(
        self, script: Script | None = None, *, ready: bool = True, keys: KeyRing = NO_KEYS, **config: Any
    ) -> Server: ...


@contextmanager
def running(store: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def start(script: Script | None = None, *, ready: bool = True, keys: KeyRing = NO_KEYS, **config: Any) -> Server:
        launcher = FakeLauncher(store, script)
        if not ready:
            launcher.store_ready.clear()
        servers.append(Server(dataclasses.replace(CONFIG, **config), launcher, keys))
        if ready:
            servers[-1].until_ready()
        return servers[-1]

    try:
        yield start
    finally:
        for server in servers:
            server.launcher.store_ready.set()
            if server._thread.is_alive():
                server.close()
            server.http.close()


CONFIG = Config(max_sequences=4, max_waiting=4, max_body=Size(bytes=100_000), drain_timeout_s=5.0)
