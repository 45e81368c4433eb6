"""An engine without a model: speaks `messages` over the real socket, from a thread of the test process.

It says what the test tells it to, one token a step, and steps only when it may: `hold` and `allow` take the place of
sleeps. Everything the server sent is kept, so that a test can wait for an abort.
"""

from __future__ import annotations

import asyncio
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from expertd_engine.messages import (
    Abort,
    BudgetSet,
    EngineInfo,
    ExpertMap,
    Fatal,
    Finished,
    FinishReason,
    Output,
    Ready,
    SequenceStats,
    SetBudget,
    Shutdown,
    Steps,
    Submit,
    ToEngine,
    TokenLogprob,
    TopLogprob,
    ToServer,
    Watch,
)
from expertd_server.service import Service
from support.fake_numbers import engine_info, snapshot
from support.fake_store import BYTE_IDS, END, ids_of

WAIT_S = 10.0
"""How long a test waits for something that must happen."""


@dataclass
class _Sequence:
    submit: Submit
    answer: Iterator[int]
    prompt_sent: bool = False
    generated: int = 0


@dataclass
class Script:
    """What engines do, shared by a test and every engine its server starts."""

    answer: bytes | list[int] | None = None
    """What every sequence says before it ends; None: letters that depend on prompt, seed and choice, without end."""
    logprob: float = -1.0
    cached_tokens: int = 0
    """Prompt tokens that every sequence claims to have found computed."""
    held: bool = False
    deaf_to_budgets: bool = False
    """Changes of the budget are never answered."""
    start_error: Fatal | None = None
    info: EngineInfo = field(default_factory=engine_info)


class FakeEngine:
    """One engine "process". Its thread owns the socket and the sequences; other threads go through `_do`."""

    pid = 1

    def __init__(self, endpoint: str, script: Script) -> None:
        self.returncode: int | None = None
        self.submitted: dict[int, Submit] = {}
        self.aborted: list[int] = []
        self.shut_down = False
        self.budget = script.info.expert_budget_bytes
        self.budgets_asked = 0
        self._watched = False
        self._script = script
        self._endpoint = endpoint
        self._permits: int | None = 0 if script.held else None
        self._muted = False
        self._live: dict[int, _Sequence] = {}
        self._steps = 0
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._context = zmq.Context()
        self._wake_in = self._context.socket(zmq.PAIR)
        self._wake_in.bind("inproc://wake")
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ as a process

    async def wait(self) -> int:
        await self._exited.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signal: int) -> None:
        self.crash(-signal)

    # ------------------------------------------------------------ what a test can do

    def allow(self, steps: int) -> None:
        """Let a held engine take so many steps with something to do."""
        self._do(lambda: self._permit(steps))

    def crash(self, returncode: int = -signal.SIGKILL) -> None:
        """End as if killed: no last word."""
        self._do(lambda: self._exit(returncode))

    def mute(self) -> None:
        """Go on living without a word."""
        self._do(lambda: setattr(self, "_muted", True))

    def fail_sequences(self, error: str, *, refused: bool = False) -> None:
        """End all live sequences with an error: the engine's own, or `refused`, that of what was asked for."""
        self._do(lambda: self._finish_all(error, refused))

    def say(self, message: ToServer) -> None:
        """Send any message."""
        self._do(lambda: self._send(message))

    def babble(self, frame: bytes) -> None:
        """Send what is no message."""
        self._do(lambda: self._socket.send(frame))

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Until `what` about this engine is true. Raises AssertionError after `WAIT_S`."""
        with self._changed:
            assert self._changed.wait_for(what, WAIT_S), "the engine never got there"

    # ------------------------------------------------------------ its thread

    def _do(self, command: Callable[[], None]) -> None:
        with self._changed:  # one thread at a time may use the waking socket
            if self.returncode is None:
                self._commands.put(command)
                self._wake_in.send(b"")

    def _run(self) -> None:
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.connect(self._endpoint)
        wake = self._context.socket(zmq.PAIR)
        wake.connect("inproc://wake")
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(wake, zmq.POLLIN)
        self._start()
        while self.returncode is None:
            ready = dict(poller.poll(0 if self._can_step() else None))
            if wake in ready:
                wake.recv()
                self._commands.get()()
            if self.returncode is None and self._socket in ready:
                self._take(msgspec.msgpack.decode(self._socket.recv(), type=ToEngine))
            if self.returncode is None and self._can_step():
                self._step()
        wake.close()
        with self._changed:
            self._wake_in.close()
        self._context.term()
        with suppress(RuntimeError):  # a server that gave up waiting has closed its loop
            self._loop.call_soon_threadsafe(self._exited.set)

    def _start(self) -> None:
        if self._script.start_error is not None:
            self._send(self._script.start_error)
            self._exit(self._script.start_error.exit_code)
            return
        self._send(Ready(self._script.info))
        self._send(snapshot(0))

    def _exit(self, returncode: int) -> None:
        with self._changed:
            self.returncode = returncode
            self._changed.notify_all()
        self._socket.close()

    def _send(self, message: ToServer) -> None:
        if not self._muted:
            self._socket.send(msgspec.msgpack.encode(message))

    def _permit(self, steps: int) -> None:
        self._permits = (self._permits or 0) + steps

    def _can_step(self) -> bool:
        return bool(self._live) and not self._muted and (self._permits is None or self._permits > 0)

    def _take(self, message: ToEngine) -> None:
        with self._changed:
            match message:
                case Submit():
                    self.submitted[message.sequence_id] = message
                    self._live[message.sequence_id] = _Sequence(message, self._answer(message))
                case Abort():
                    self.aborted += message.sequence_ids
                    live = (self._live.pop(i, None) for i in message.sequence_ids)
                    ended = [self._end(sequence, "abort") for sequence in live if sequence is not None]
                    self._send(Steps([], ended))
                case SetBudget():
                    self.budgets_asked += 1
                    if not self._script.deaf_to_budgets:
                        self._set_budget(message.expert_budget_bytes or self.budget)
                case Watch():
                    self._watched = True
                    self._draw()
                case Shutdown():
                    self.shut_down = True
            self._changed.notify_all()
        if self.shut_down:
            self._exit(0)

    def _draw(self) -> None:
        """Somebody looks: every step leases other experts."""
        leased = self._steps % 2
        self._send(ExpertMap(["rL.o" if leased else "Lr.o", "r..x"]))

    def _set_budget(self, asked: int) -> None:
        """As the engine does it, between the bounds of the script's info."""
        info = self._script.info
        allowed = info.minimum_expert_budget_bytes <= asked <= info.maximum_expert_budget_bytes
        self.budget = asked if allowed else self.budget
        self._send(snapshot(self._steps, budget=self.budget))
        self._send(BudgetSet(self.budget, self.budget, None if allowed else f"{asked} bytes are out of bounds"))

    def _answer(self, submit: Submit) -> Iterator[int]:
        answer = self._script.answer
        if answer is None:
            sampling = submit.sampling
            start = sum(submit.inputs[0].token_ids)
            start += sampling.seed + submit.choice_index if sampling.temperature > 0 else 0
            while True:
                yield from ids_of(chr(ord("a") + start % 26))
                start += 1
        else:
            yield from [BYTE_IDS[b] for b in answer] if isinstance(answer, bytes) else answer

    def _step(self) -> None:
        if self._permits is not None:
            self._permits -= 1
        self._steps += 1
        outputs, finished = [], []
        started = [i for i, sequence in self._live.items() if not sequence.prompt_sent]
        for sequence in list(self._live.values()):
            output, end = self._advance(sequence)
            outputs.append(output)
            if end is not None:
                finished.append(end)
                del self._live[end.sequence_id]
        self._send(Steps(outputs, finished, started))
        self._send(snapshot(self._steps, running=len(self._live), budget=self.budget))
        if self._watched:
            self._draw()

    def _advance(self, sequence: _Sequence) -> tuple[Output, Finished | None]:
        submit, sampling = sequence.submit, sequence.submit.sampling
        prompt = None
        if not sequence.prompt_sent and sampling.prompt_logprobs is not None:
            ids = submit.inputs[0].token_ids
            prompt = [None, *(self._logprob(i, sampling.prompt_logprobs) for i in ids[1:])]
        sequence.prompt_sent = True
        if sampling.max_tokens == 0:
            return Output(submit.sequence_id, [], None, prompt), self._end(sequence, "length")
        token = next(sequence.answer, END)
        sequence.generated += 1
        logprobs = [self._logprob(token, sampling.logprobs)] if sampling.logprobs is not None else None
        cached = self._script.cached_tokens if sequence.generated == 1 else 0
        output = Output(submit.sequence_id, [token], logprobs, prompt, cached)
        answer = self._script.answer
        if sampling.constraint is not None and answer is not None and sequence.generated == len(answer):
            return output, self._end(sequence, "stop", constraint_met=True)
        may_stop = sequence.generated >= sampling.min_tokens
        if may_stop and ((token == END and not sampling.ignore_eos) or token in sampling.stop_token_ids):
            return output, self._end(sequence, "stop", token)
        return output, self._end(sequence, "length") if sequence.generated >= sampling.max_tokens else None

    def _logprob(self, token: int, alternatives: int) -> TokenLogprob:
        top = [TopLogprob((token + 1 + i) % 256, self._script.logprob - 1 - i) for i in range(alternatives)]
        return TokenLogprob(token, self._script.logprob, top)

    @staticmethod
    def _end(
        sequence: _Sequence, reason: FinishReason, stop_token_id: int | None = None, *, constraint_met: bool = False
    ) -> Finished:
        stats = SequenceStats(queue_s=0.001, expert_hits=3, expert_misses=1, loaded_bytes=4096)
        if sequence.submit.mode == "virtual":
            stats = msgspec.structs.replace(stats, choices=8, substituted=2, substituted_mass=0.5, virtual_tokens=2)
        sequence_id = sequence.submit.sequence_id
        return Finished(sequence_id, reason, stop_token_id, constraint_met=constraint_met, stats=stats)

    def _finish_all(self, error: str, refused: bool) -> None:
        ended = [Finished(i, "error", error=error, refused=refused) for i in self._live]
        self._live.clear()
        self._send(Steps([], ended))


class FakeLauncher:
    """Starts fake engines. `store_ready` lets a test keep the server loading; `engines` are all it ever started."""

    def __init__(self, store: Path, script: Script | None = None) -> None:
        self.script = script or Script()
        self.engines: list[FakeEngine] = []
        self.store_ready = threading.Event()
        self.store_ready.set()
        self._store = store
        self._started = threading.Condition()

    async def resolve_store(self, service: Service) -> Path:
        service.progressed("convert", 0.25)
        await asyncio.to_thread(self.store_ready.wait, WAIT_S)
        return self._store

    async def start_engine(self, store: Path, endpoint: str) -> FakeEngine:
        with self._started:
            self.engines.append(FakeEngine(endpoint, self.script))
            self._started.notify_all()
        return self.engines[-1]

    def wait_for_engine(self, count: int) -> FakeEngine:
        """The `count`-th engine, once there is one."""
        with self._started:
            assert self._started.wait_for(lambda: len(self.engines) >= count, WAIT_S)
        return self.engines[count - 1]
