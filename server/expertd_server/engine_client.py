"""The asynchronous side of the seam: submit sequences, follow them, abort them, hear of counters.

`EngineClient` owns the socket and the table of live sequences, on the event loop. Each request owns its `Reply`. A
dead engine answers everybody: those who wait now, and (through `Service`) those who come later.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import zmq
import zmq.asyncio

from expertd_engine.messages import (
    Abort,
    BudgetSet,
    ExpertMap,
    Fatal,
    Finished,
    Output,
    Progress,
    Ready,
    Steps,
    Submit,
    ToEngine,
    ToServer,
)
from expertd_engine.snapshot import Snapshot
from expertd_server.errors import ApiError, EngineDead, Unavailable

MAX_BUFFERED_TOKENS = 4096
"""Tokens kept for a client that does not read. A client this far behind has stopped, and is cut off."""


class Update(NamedTuple):
    """What one step brought for one sequence: new tokens, its end, or both."""

    sequence_id: int
    output: Output | None
    finished: Finished | None


class SlowReader(ApiError):
    """The client did not read its stream, and what waits for it has reached the bound."""

    code = "slow_reader"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the stream was not read: more than {limit} tokens were waiting for the client")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the sequences of a request may wait for their first step, and who hears of each that has it."""

    max_wait_s: float
    started: Callable[[int], None]
    """Told the number of the sequence's prompt tokens."""


class Reply:
    """The updates of one request's sequences, in order, for the one task that owns the request."""

    def __init__(self, max_buffered_tokens: int, waiting: dict[int, int], patience: Patience | None) -> None:
        """`waiting` has the prompt tokens of each sequence, by its id."""
        self._waiting = waiting
        self._patience = patience
        self._begun = False
        self._updates: deque[Update] = deque()
        self.buffered_tokens = 0
        """Not taken yet."""
        self._limit = max_buffered_tokens
        self._failure: ApiError | None = None
        self._news = asyncio.Event()

    async def next(self) -> Update:
        """The next update. Raises the failure that ended the request, at once, even before what is buffered."""
        while self._failure is None and not self._updates:
            self._news.clear()
            await self._news.wait()
        if self._failure is not None:
            raise self._failure
        update = self._updates.popleft()
        self.buffered_tokens -= _tokens(update)
        return update

    def put(self, update: Update) -> bool:
        """Add an update; False when this made the reply fail because nobody reads it."""
        self._updates.append(update)
        self.buffered_tokens += _tokens(update)
        if self.buffered_tokens > self._limit:
            self.fail(SlowReader(self._limit))
        self._news.set()
        return self._failure is None

    def begin(self, sequence_id: int) -> None:
        """This sequence waits no longer."""
        self._begun = True
        prompt_tokens = self._waiting.pop(sequence_id, None)
        if self._patience is not None and prompt_tokens is not None:
            self._patience.started(prompt_tokens)

    def expire(self) -> None:
        """The patience is over: fail, unless something has begun. Whoever waited this long may come back at once."""
        if self._patience is not None and not self._begun:
            waited = f"the request waited {self._patience.max_wait_s:g} s and was not begun"
            self.fail(Unavailable(waited, bound="queue_wait"))

    def fail(self, error: ApiError) -> None:
        """End the request with `error`; what is buffered is dropped."""
        self._failure = self._failure or error
        self._updates.clear()
        self.buffered_tokens = 0
        self._news.set()


def _prompt_tokens(sequence: Submit) -> int:
    return sum(len(part.token_ids) for part in sequence.inputs)


def _tokens(update: Update) -> int:
    return len(update.output.token_ids) if update.output is not None else 0


@dataclass(slots=True)
class Handlers:
    """Who hears of the messages that belong to no request."""

    progress: Callable[[Progress], None]
    ready: Callable[[Ready], None]
    snapshot: Callable[[Snapshot], None]
    experts: Callable[[ExpertMap], None]
    budget_set: Callable[[BudgetSet], None]
    fatal: Callable[[Fatal], None]


class EngineClient:
    """Speaks to one engine process at a time. Sequence ids are never used twice, also not across engines."""

    def __init__(self, handlers: Handlers, max_buffered_tokens: int = MAX_BUFFERED_TOKENS) -> None:
        self._handlers = handlers
        self._max_buffered_tokens = max_buffered_tokens
        self._socket: zmq.asyncio.Socket | None = None
        self._live: dict[int, Reply] = {}
        self._last_id = 0
        self._decoder = msgspec.msgpack.Decoder(ToServer)
        self._encoder = msgspec.msgpack.Encoder()
        self.heard_s = time.monotonic()
        """When the engine last said anything, on this process's monotonic clock."""

    @property
    def live_sequences(self) -> int:
        return len(self._live)

    @property
    def is_connected(self) -> bool:
        """Whether an engine process can be spoken to."""
        return self._socket is not None

    def buffered_tokens(self) -> int:
        """Tokens that their requests have not taken yet."""
        return sum(reply.buffered_tokens for reply in set(self._live.values()))

    def new_ids(self, count: int) -> list[int]:
        """Ids for `count` sequences."""
        first, self._last_id = self._last_id + 1, self._last_id + count
        return list(range(first, self._last_id + 1))

    @contextmanager
    def submit(self, sequences: Sequence[Submit], patience: Patience | None = None) -> Iterator[Reply]:
        """Start sequences and follow them while the block runs; whatever still lives at its end is aborted, and all of
        it where `patience` ends before the first of them has begun."""
        reply = Reply(self._max_buffered_tokens, {s.sequence_id: _prompt_tokens(s) for s in sequences}, patience)
        timer = asyncio.get_running_loop().call_later(patience.max_wait_s, reply.expire) if patience else None
        try:
            for sequence in sequences:
                self._live[sequence.sequence_id] = reply
                self.send(sequence)
            yield reply
        finally:
            if timer is not None:
                timer.cancel()
            self.abort([sequence.sequence_id for sequence in sequences])

    def abort(self, sequence_ids: Sequence[int], *, hear_end: bool = False) -> None:
        """End those that still live. Nothing more is heard of them, unless their end is to be heard: its statistics."""
        live = [i for i in sequence_ids if i in self._live]
        if not hear_end:
            for i in live:
                del self._live[i]
        if live and self._socket is not None:
            self.send(Abort(live))

    def fail_all(self, error: ApiError) -> None:
        """End every live request with `error` and tell the engine, if there is one."""
        for reply in set(self._live.values()):
            reply.fail(error)
        self.abort(list(self._live))

    def send(self, message: ToEngine) -> None:
        """Hand a message to the socket. Its queue is unbounded: admission bounds what gets here. Raises EngineDead."""
        if self._socket is None:
            raise EngineDead("no engine is connected")
        self._socket.send(self._encoder.encode(message))

    async def serve(self, socket: zmq.asyncio.Socket) -> None:
        """Read everything one engine process sends, until cancelled. Raises msgspec.ValidationError when it speaks
        another protocol."""
        self._socket = socket
        self.heard_s = time.monotonic()
        try:
            while True:
                frame = await socket.recv()
                self.heard_s = time.monotonic()
                self._dispatch(self._decoder.decode(frame))
        finally:
            self._socket = None

    def _dispatch(self, message: ToServer) -> None:
        match message:
            case Steps():
                self._deliver(message)
            case Snapshot():
                self._handlers.snapshot(message)
            case ExpertMap():
                self._handlers.experts(message)
            case Progress():
                self._handlers.progress(message)
            case Ready():
                self._handlers.ready(message)
            case BudgetSet():
                self._handlers.budget_set(message)
            case Fatal():
                self._handlers.fatal(message)

    def _deliver(self, steps: Steps) -> None:
        """Pair each sequence's tokens with its end, so that the reader knows which token is the last."""
        for sequence_id in steps.started:
            if sequence_id in self._live:
                self._live[sequence_id].begin(sequence_id)
        finished = {f.sequence_id: f for f in steps.finished}
        for output in steps.outputs:
            self._put(Update(output.sequence_id, output, finished.pop(output.sequence_id, None)))
        for sequence_id, end in finished.items():
            self._put(Update(sequence_id, None, end))

    def _put(self, update: Update) -> None:
        reply = self._live.get(update.sequence_id)
        if reply is None:  # ended while its abort was under way
            return
        if update.finished is not None:
            del self._live[update.sequence_id]
        if not reply.put(update):
            self.abort([i for i, other in self._live.items() if other is reply])
