"""The engine process's only endless loop: inbox → step → outbox. Owns the socket and, through `Engine`, all state."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import msgspec
import zmq

from expertd_engine.live_budget import LiveBudget
from expertd_engine.messages import Abort, SetBudget, Shutdown, Submit, ToEngine, ToServer, Watch
from expertd_engine.pressure import PressureReader
from expertd_engine.reporting import StepMeter, take_expert_map, take_snapshot
from expertd_engine.startup import Engine

if TYPE_CHECKING:
    from expertd_engine.device_startup import DeviceEngine

logger = logging.getLogger(__name__)

SNAPSHOT_BUSY_S = 0.25
SNAPSHOT_IDLE_S = 1.0
MEMORY_EVERY_S = 1.0
MAP_EVERY_S = 0.25
REFILLING_S = 0.001


class Channel:
    """The engine's end of the socket: typed messages instead of frames."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 2000)  # milliseconds; long enough for a last Fatal
        self._socket.setsockopt(zmq.SNDHWM, 0)  # the engine never blocks on a slow server
        self._socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: ToServer) -> None:
        self._socket.send(self._encoder.encode(message))

    def receive(self, timeout_s: float) -> ToEngine | None:
        """The next message, or None when none comes in time."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        message: ToEngine = self._decoder.decode(self._socket.recv())
        return message

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class EngineLoop:
    """Runs until `Shutdown`."""

    def __init__(
        self, engine: Engine | DeviceEngine, meter: StepMeter, channel: Channel, pressure: PressureReader | None = None
    ) -> None:
        """`pressure` as for `LiveBudget`."""
        self._engine = engine
        self._meter = meter
        self._channel = channel
        self._stopping = False
        self._budget = LiveBudget(engine, pressure)
        self._last_snapshot_s = 0.0
        self._last_map_s = 0.0
        self._watched_until_s = 0.0
        self._measured_s = 0.0
        self._memory = engine.meter.measure()
        engine.cache.pulse = self._pulse
        self._warm = engine.warm

    def run(self) -> None:
        core = self._engine.core
        self._engine.sweep.begin()
        self._snapshot(time.monotonic())
        if self._warm is not None:
            self._warm.recall()
        while True:
            self._take_inbox(self._patience_s())
            if self._stopping:
                break
            if core.has_work:
                steps = core.step(time.monotonic())
                if steps.outputs or steps.finished or steps.started:
                    self._channel.send(steps)
            if not core.has_work:  # at once: what runs for nobody may keep the processor awake
                self._engine.runner.idle()
            self._heartbeat()
        self._channel.send(core.end_all(time.monotonic()))
        if self._warm is not None:
            self._warm.keep()
        if self._engine.recorder is not None:
            self._engine.recorder.close()
        self._engine.sweep.close()
        self._engine.cache.close()

    def _patience_s(self) -> float:
        """How long to wait for a message: not at all while there is work, little while loads end without anyone."""
        if self._engine.core.has_work:
            return 0.0
        return REFILLING_S if self._warm is not None and self._warm.is_recalling else SNAPSHOT_BUSY_S

    def _take_inbox(self, timeout_s: float) -> None:
        message = self._channel.receive(timeout_s)
        while message is not None:
            self._take(message)
            message = self._channel.receive(0.0)

    def _take(self, message: ToEngine) -> None:
        core = self._engine.core
        match message:
            case Submit():
                core.submit(message, time.monotonic())
            case Abort(sequence_ids):
                core.abort(sequence_ids, time.monotonic())
            case SetBudget():
                self._channel.send(self._budget.set(message))
            case Watch(seconds):
                self._watched_until_s = time.monotonic() + seconds
            case Shutdown():
                self._stopping = True

    def _heartbeat(self) -> None:
        now, busy = time.monotonic(), self._engine.core.has_work
        interval = SNAPSHOT_BUSY_S if busy else SNAPSHOT_IDLE_S
        if now - self._last_snapshot_s >= interval:
            self._snapshot(now)
            if self._warm is not None:
                self._warm.tick(now)
        if not busy:  # while it is, maps are drawn inside steps: between them nothing is leased
            self._draw_map(now)

    def _pulse(self) -> None:
        """Inside a step, between two layers: a step that takes long is at work, and not to be taken for wedged."""
        now = time.monotonic()
        if now - self._last_snapshot_s >= SNAPSHOT_IDLE_S:
            self._send_snapshot(now)
        self._draw_map(now)

    def _draw_map(self, now: float) -> None:
        if now < self._watched_until_s and now - self._last_map_s >= MAP_EVERY_S:
            self._last_map_s = now
            self._channel.send(take_expert_map(self._engine))

    def _snapshot(self, now: float) -> None:
        if now - self._measured_s >= MEMORY_EVERY_S:
            self._memory = self._engine.meter.measure()
            self._measured_s = now
            self._budget.tick(self._memory)
        if not self._engine.core.has_work:
            self._engine.cache.ledger.check()
        self._send_snapshot(now)

    def _send_snapshot(self, now: float) -> None:
        self._last_snapshot_s = now
        self._channel.send(take_snapshot(self._engine, self._meter, self._memory, self._budget, now))
