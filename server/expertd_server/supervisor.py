"""Preparing the model, starting the engine process, watching it, starting it again. Owner of the child processes.

    resolve the store ─> start engine ─> Ready ─> watch ─┬─ exit ───┐
                           ^                             └─ wedged ─┤ (kill)
                           └──────── back-off, bounded tries <──────┘

What fails before the first `Ready` ends the server with the child's exit code; what fails later ends the live
requests with `engine_dead` at once and is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.asyncio

from expertd_engine.errors import EngineError, ResourceError
from expertd_engine.messages import PROTOCOL_VERSION, EngineInfo, Fatal, Ready, Shutdown
from expertd_server.chat_format import ChatFormat
from expertd_server.errors import EngineDead
from expertd_server.launcher import ChildFailed, Launcher, Process
from expertd_server.prompts import TextCodec
from expertd_server.service import Service

logger = logging.getLogger("expertd.supervisor")

HEARTBEAT_S = 30.0
"""A busy engine that says nothing for this long is taken for wedged; it reports every 250 ms, and in a long
step about every second, between two layers."""

LOOK_S = 1.0
"""How often the engine is looked at."""

STOP_TIMEOUT_S = 5.0
"""Seconds an engine gets to exit after `Shutdown`, or to write its stacks after SIGABRT."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often a dead engine is started again. The count begins anew once one has served for `healthy_s`."""

    tries: int = 5
    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    healthy_s: float = 60.0

    def delay_s(self, attempt: int) -> float:
        """Seconds to wait before the next try, after so many that failed in a row."""
        return min(self.first_delay_s * 2.0 ** min(attempt, 64), self.max_delay_s)


DEFAULT_RESTARTS = RestartPolicy()


class Silence:
    """How long a busy engine has said nothing, in time that this process has seen pass.

    Where server and engine are frozen together (a paused container or virtual machine, SIGSTOP) the clock goes on, and
    that time is not the engine's fault: between two looks, two intervals count at most.
    """

    def __init__(self, now_s: float) -> None:
        self.seconds = 0.0
        self._looked_s = now_s
        self._heard_s = float("-inf")

    def look(self, now_s: float, heard_s: float, *, busy: bool) -> float:
        """Seconds of silence by now; `heard_s` is when the engine last spoke, `busy` whether it has to."""
        is_silent = busy and heard_s == self._heard_s
        self.seconds = self.seconds + min(now_s - self._looked_s, 2 * LOOK_S) if is_silent else 0.0
        self._looked_s, self._heard_s = now_s, heard_s
        return self.seconds


def how_it_ended(status: int | None) -> str:
    """A child's exit status in words; it holds nothing that a client may not see."""
    if status is None:
        return "never started"
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = ": by hand, or by the kernel for want of memory" if -status == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


class Supervisor:
    """Keeps one engine process serving. `run` ends only by raising what the server has to exit with."""

    def __init__(
        self,
        service: Service,
        launcher: Launcher,
        policy: RestartPolicy = DEFAULT_RESTARTS,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._service = service
        self._launcher = launcher
        self._policy = policy
        self._heartbeat_s = heartbeat_s
        self._process: Process | None = None
        self._codec: TextCodec | None = None
        self._chat: ChatFormat | None = None
        self._fatal: Fatal | None = None
        self._stopping = False
        self._served_since_s: float | None = None

    async def run(self) -> None:
        """Prepare the model, then keep an engine serving it, until `stop`. Raises the ExpertdError that the server has
        to exit with."""
        store = await self._launcher.resolve_store(self._service)
        self._codec, self._chat = await asyncio.to_thread(_load_text_side, store, self._service.config.tool_parser)
        attempt = 0
        while True:
            reason = await self._run_engine(store)
            if self._stopping:
                return
            attempt = 0 if self._was_healthy() else attempt + 1
            if attempt > self._policy.tries:
                raise EngineError(f"the engine failed {attempt} times in a row; the last time: {self._last_words()}")
            self._service.metrics.restarts.labels(reason).inc()
            self._service.engine_failed(reason, how_it_ended(self._status()))
            delay_s = self._policy.delay_s(attempt)
            fields = {"reason": reason, "why": self._last_words(), "attempt": attempt, "delay_s": delay_s}
            logger.warning("engine ended, starting it again", extra={"fields": fields})
            await asyncio.sleep(delay_s)

    async def stop(self) -> None:
        """End the engine: ask, wait, then kill."""
        self._stopping = True
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(EngineDead):  # it never connected, or has gone
            self._service.engine.send(Shutdown())
        await self._end(self._process, signal.SIGTERM)

    def kill(self) -> None:
        """End the engine without waiting."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)

    # ------------------------------------------------------------ messages, called by the client

    def ready(self, message: Ready) -> None:
        """The engine says that it serves."""
        spoken = message.info.protocol
        if spoken != PROTOCOL_VERSION:
            self._give_up(f"the engine speaks protocol {spoken}, the server {PROTOCOL_VERSION}")
        elif self._served_since_s is not None:
            self._give_up("the engine said twice that it is ready")
        else:
            self._served(message.info)

    def _give_up(self, reason: str) -> None:
        self._fatal = Fatal(EngineError.exit_code, reason)
        self._signal(signal.SIGKILL)

    def _served(self, info: EngineInfo) -> None:
        assert self._codec is not None
        assert self._chat is not None
        self._served_since_s = time.monotonic()
        self._service.became_ready(self._codec, self._chat, info)
        logger.info("ready", extra={"fields": self._service.summary()})
        for fallback in info.fallbacks:
            logger.warning("fallback", extra={"fields": {"fallback": fallback}})

    def fatal(self, message: Fatal) -> None:
        """The engine's last words."""
        self._fatal = message

    # ------------------------------------------------------------ one engine process

    async def _run_engine(self, store: Path) -> str:
        """Serve with one engine process until it ends; says why. Raises ChildFailed if it never got ready the first
        time."""
        self._fatal, self._served_since_s, self._process = None, None, None
        try:
            reason = await self._serve_with_one(store)
        except (OSError, zmq.ZMQError) as error:  # no room for a socket, no process to be had: perhaps later
            reason = "start"
            self._fatal = Fatal(ResourceError.exit_code, f"no engine process can be started: {error}")
            self._mark_dead()
        if self._service.model is None and not self._stopping:
            raise ChildFailed(self._fatal.exit_code if self._fatal else EngineError.exit_code, self._last_words())
        return reason

    async def _serve_with_one(self, store: Path) -> str:
        async with _private_socket() as (socket, endpoint):
            reading = asyncio.create_task(self._service.engine.serve(socket))
            try:
                self._process = await self._launcher.start_engine(store, endpoint)
                reason = await self._watch(self._process, reading)
                self._mark_dead()
                await self._hear_the_rest(reading)
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                self._ended()
        return reason

    async def _watch(self, process: Process, reading: asyncio.Task[None]) -> str:
        """Wait for the end of the process, or bring it about when it is wedged or speaks gibberish."""
        exited = asyncio.create_task(process.wait())
        silence = Silence(time.monotonic())
        try:
            while not exited.done():
                await asyncio.wait((exited, reading), timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                if exited.done():
                    break
                if reading.done() or self._is_wedged(silence):
                    self._fatal = _wedged(silence.seconds, gibberish=reading.done())
                    self._fail_requests()
                    await self._end(process, signal.SIGABRT)
                    return "wedged"
            return "exit"
        finally:
            exited.cancel()

    async def _hear_the_rest(self, reading: asyncio.Task[None]) -> None:
        """The last words of a process that has ended may still be in the socket: `Fatal`, the last tokens."""
        await asyncio.wait((reading,), timeout=0.2)

    def _is_wedged(self, silence: Silence) -> bool:
        engine = self._service.engine
        silent_s = silence.look(time.monotonic(), engine.heard_s, busy=engine.live_sequences > 0)
        return silent_s > self._heartbeat_s

    def _ended(self) -> None:
        self._fail_requests()
        if self._served_since_s is not None:
            self._service.engine_ended()

    def _mark_dead(self) -> None:
        if self._service.model is not None:
            self._service.set_state("engine_dead")

    def _fail_requests(self) -> None:
        self._mark_dead()
        self._service.engine.fail_all(EngineDead())

    async def _end(self, process: Process, gently: signal.Signals) -> None:
        """Wait for the process, with `gently` once half the time is over or at once for SIGABRT, then SIGKILL."""
        waiting = asyncio.create_task(process.wait())
        if gently is not signal.SIGABRT:
            await asyncio.wait((waiting,), timeout=STOP_TIMEOUT_S / 2)
        for number in (gently, signal.SIGKILL):
            if not waiting.done():
                self._signal(number)
                await asyncio.wait((waiting,), timeout=STOP_TIMEOUT_S / 2)
        await waiting

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    def _was_healthy(self) -> bool:
        return self._served_since_s is not None and time.monotonic() - self._served_since_s > self._policy.healthy_s

    def _last_words(self) -> str:
        if self._fatal is not None:
            return self._fatal.error
        return f"the engine process {how_it_ended(self._status())}; its own output, if any, is above"

    def _status(self) -> int | None:
        return self._process.returncode if self._process is not None else None


def _wedged(silent_s: float, *, gibberish: bool) -> Fatal:
    said = "what is no message" if gibberish else f"nothing for {silent_s:.0f} s with requests under way"
    return Fatal(EngineError.exit_code, f"the engine said {said}, and was ended; its stacks are above")


def _load_text_side(store: Path, tool_parser: str) -> tuple[TextCodec, ChatFormat]:
    """What the server itself needs of a model. Raises StoreError."""
    codec = TextCodec.load(store)
    return codec, ChatFormat(codec, tool_parser)


@asynccontextmanager
async def _private_socket() -> AsyncIterator[tuple[zmq.asyncio.Socket, str]]:
    """A bound PAIR socket that only this user can reach: its folder has mode 0700 and goes with it."""
    with tempfile.TemporaryDirectory(prefix="expertd-") as folder:
        endpoint = f"ipc://{folder}/engine"
        with zmq.asyncio.Context() as context:
            socket = context.socket(zmq.PAIR)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.bind(endpoint)
            try:
                yield socket, endpoint
            finally:
                socket.close()
