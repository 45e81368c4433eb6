"""The life of the server process: bind, answer, load, serve, drain, exit. Owner of the HTTP server and the signals.

bind ─> /live answers ─> model loads ─> ready ─> signal ─> drain ─> engine stops ─> exit 0
                                                    └─ second signal ─> exit 128 + its number
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn

from expertd_engine.config import Config
from expertd_engine.errors import ConfigError, EngineError, ResourceError
from expertd_server.admission import Admission, Bodies
from expertd_server.app import create_app
from expertd_server.auth import NO_KEYS, KeyRing
from expertd_server.connections import BoundedProtocol
from expertd_server.console import Console
from expertd_server.engine_client import EngineClient, Handlers
from expertd_server.errors import ApiError, Draining
from expertd_server.launcher import Launcher
from expertd_server.metrics import Metrics
from expertd_server.notify import Notifier
from expertd_server.service import Service
from expertd_server.supervisor import DEFAULT_RESTARTS, RestartPolicy, Supervisor

logger = logging.getLogger("expertd.daemon")

GOODBYE_S = 2.0
"""Seconds for the last error events to reach their clients."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ResourceError naming host and port."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        hint = "; end who listens there, or give another --port" if taken else ""
        raise ResourceError(f"cannot listen on {host}:{port}: {reason}{hint}") from error
    # Inherited by every connection. asyncio sets it only where a socket names its protocol, which these do not, and
    # without it each small answer waits 40 ms for the client's delayed acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


class _Server(uvicorn.Server):
    """uvicorn closes its socket on the first signal, so that nobody could be told of draining: signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Daemon:
    """One server process. `run` returns its exit code, or raises the ExpertdError that ends it."""

    def __init__(
        self,
        config: Config,
        listening: socket.socket,
        launcher: Launcher,
        policy: RestartPolicy = DEFAULT_RESTARTS,
        keys: KeyRing = NO_KEYS,
    ) -> None:
        self._config = config
        self._listening = listening
        address = str(listening.getsockname()[0])
        if not keys.api and not ipaddress.ip_address(address).is_loopback:
            logger.warning("whoever reaches the port may ask: give API keys", extra={"fields": {"address": address}})
        engine = EngineClient(
            Handlers(
                progress=lambda m: self.service.progressed(m.stage, m.fraction),
                ready=lambda m: self.supervisor.ready(m),
                snapshot=lambda m: self.service.metrics.observe(m),
                experts=lambda m: self.service.console.drew(m),
                budget_set=lambda m: self.service.console.budget_set(m),
                fatal=lambda m: self.supervisor.fatal(m),
            )
        )
        admission = Admission(
            config.max_sequences + config.max_waiting, config.max_queued_tokens, config.max_per_key,
            config.max_queue_wait_s,
        )  # fmt: skip
        bodies = Bodies(config.max_bodies.resolve(0))
        metrics = Metrics()
        metrics.transfer_threads.set(config.io_threads)
        self.service = Service(config, engine, metrics, admission, bodies, Console(engine))
        self.supervisor = Supervisor(self.service, launcher, policy)
        self._http = _Server(
            uvicorn.Config(
                create_app(self.service, keys), http=BoundedProtocol,
                log_config=None, access_log=False, server_header=False, lifespan="off",
                ws="none", timeout_graceful_shutdown=int(GOODBYE_S), timeout_keep_alive=75,
            )
        )  # fmt: skip
        self._stop = asyncio.Event()
        self._abort = asyncio.Event()
        self._signals: list[int] = []
        self._reloading: asyncio.Future[None] | None = None
        """Held, or it might be collected before it ends."""

    def stop(self, number: int = signal.SIGTERM) -> None:
        """A signal came: the first drains, the second gives up at once."""
        self._signals.append(number)
        (self._stop if len(self._signals) == 1 else self._abort).set()

    def handle_signals(self, reload: Callable[[], Config] | None = None) -> None:
        """Make SIGTERM and SIGINT call `stop`, and SIGHUP `reload` the configuration. Main thread only."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, number)
        if reload is not None:
            loop.add_signal_handler(signal.SIGHUP, self.reload, reload)

    def reload(self, read: Callable[[], Config]) -> None:
        """Take the budgets of a configuration that has changed, while requests run. Nothing else of it can change."""
        try:
            self._reloading = asyncio.ensure_future(self._take_budgets(read()))
        except ConfigError as error:
            logger.error("configuration not read again", extra={"fields": {"error": str(error)}})

    async def _take_budgets(self, config: Config) -> None:
        experts, memory = config.expert_budget, config.memory_budget
        if experts is None and memory is None:
            logger.warning("no budget in the configuration: the ones in force stay")
            return
        try:
            total = self.service.serving().info.expert_bytes_total
            answer = await self.service.console.set_budget(
                None if experts is None else experts.resolve(total), None if memory is None else memory.resolve(0)
            )
        except ApiError as error:
            logger.error("budgets not changed", extra={"fields": {"error": str(error)}})
            return
        if answer.error is not None:
            logger.error("budgets not changed", extra={"fields": {"error": answer.error}})

    async def run(self) -> int:
        """Serve until a signal comes. Returns the exit code; raises the ExpertdError that ends the server."""
        http = asyncio.create_task(self._http.serve([self._listening]))
        life = asyncio.create_task(self.supervisor.run())
        stopped = asyncio.create_task(self._stop.wait())
        telling = asyncio.create_task(Notifier(self.service, os.environ).run())
        try:
            await asyncio.wait((http, life, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not stopped.done():
                await (life if life.done() else http)
                raise EngineError("the HTTP server ended by itself")
            return await self._drain_or_abort(life)
        finally:
            stopped.cancel()
            telling.cancel()
            self.supervisor.kill()
            life.cancel()
            await asyncio.gather(life, telling, return_exceptions=True)
            self._http.should_exit = True
            self._http.force_exit = self._abort.is_set()
            await http

    async def _drain_or_abort(self, life: asyncio.Task[None]) -> int:
        draining = asyncio.create_task(self._drain(life))
        aborted = asyncio.create_task(self._abort.wait())
        await asyncio.wait((draining, aborted), return_when=asyncio.FIRST_COMPLETED)
        if aborted.done():
            draining.cancel()
            return 128 + self._signals[-1]
        aborted.cancel()
        await draining
        return 0

    async def _drain(self, life: asyncio.Task[None]) -> None:
        service = self.service
        service.set_state("draining")
        logger.info("draining", extra={"fields": {"sequences": service.admission.used}})
        await self._until_idle(self._config.drain_timeout_s)
        service.engine.fail_all(Draining())
        await self._until_idle(GOODBYE_S)
        await self.supervisor.stop()

    async def _until_idle(self, timeout_s: float) -> None:
        """Wait until no request is left. Polled: it happens once in the life of the process."""
        end_s = time.monotonic() + timeout_s
        while self.service.admission.used and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
