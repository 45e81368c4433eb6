"""The engine process's only endless loop: inbox → step → outbox. Owns the socket and, through `Engine`, all state."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left

import msgspec
import zmq

from expertd_engine.core import Forward, StepResult
from expertd_engine.errors import ExpertdError
from expertd_engine.experts.transfer import LATENCY_BOUNDS_S
from expertd_engine.memory import MemoryUse
from expertd_engine.messages import (
    Abort,
    BudgetSet,
    HistogramData,
    LayerLookups,
    SetBudget,
    Shutdown,
    Snapshot,
    Submit,
    ToEngine,
    ToServer,
)
from expertd_engine.planning.guard import ExpertBudget, guarded_expert_budget
from expertd_engine.scheduler import StepPlan
from expertd_engine.startup import Engine

logger = logging.getLogger(__name__)

SNAPSHOT_BUSY_S = 0.25
SNAPSHOT_IDLE_S = 1.0
MEMORY_EVERY_S = 1.0

STEP_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0)
STEP_BOUNDS_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


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


class Histogram:
    """Counts by upper bound; see `messages.HistogramData`."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def data(self) -> HistogramData:
        return HistogramData(list(self._bounds), list(self._counts), self._total)


class StepMeter:
    """The engine's `Forward`: passes plans on and counts what they were."""

    def __init__(self, forward: Forward) -> None:
        self.steps = {"prefill": 0, "decode": 0}
        self.seconds = Histogram(STEP_BOUNDS_S)
        self.tokens = Histogram(STEP_BOUNDS_TOKENS)
        self._forward = forward

    def __call__(self, plan: StepPlan) -> StepResult:
        result = self._forward(plan)
        self.steps[plan.phase] += 1
        self.seconds.add(result.duration_s)
        self.tokens.add(plan.num_tokens)
        return result


class EngineLoop:
    """Runs until `Shutdown`."""

    def __init__(self, engine: Engine, meter: StepMeter, channel: Channel) -> None:
        self._engine = engine
        self._meter = meter
        self._channel = channel
        self._stopping = False
        self._memory_shrinks = 0
        self._planned_experts = engine.cache.ledger.budget_bytes
        self._last_snapshot_s = 0.0
        self._measured_s = 0.0
        self._memory = engine.meter.measure()
        engine.cache.pulse = self._pulse

    def run(self) -> None:
        core = self._engine.core
        self._snapshot(time.monotonic())
        while True:
            self._take_inbox(0.0 if core.has_work else SNAPSHOT_BUSY_S)
            if self._stopping:
                break
            if core.has_work:
                steps = core.step(time.monotonic())
                if steps.outputs or steps.finished or steps.started:
                    self._channel.send(steps)
            else:
                self._engine.cache.pump()
            self._heartbeat()
        self._engine.cache.close()

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
            case SetBudget(expert_budget_bytes):
                self._set_budget(expert_budget_bytes)
            case Shutdown():
                self._stopping = True

    def _set_budget(self, expert_budget_bytes: int) -> None:
        error = None
        try:
            self._engine.cache.set_budget(expert_budget_bytes)
            self._planned_experts = expert_budget_bytes
        except (ExpertdError, ValueError) as refusal:
            error = str(refusal)
        self._channel.send(BudgetSet(self._engine.cache.ledger.budget_bytes, error))

    def _heartbeat(self) -> None:
        now = time.monotonic()
        interval = SNAPSHOT_BUSY_S if self._engine.core.has_work else SNAPSHOT_IDLE_S
        if now - self._last_snapshot_s >= interval:
            self._snapshot(now)

    def _pulse(self) -> None:
        """Inside a step, between two layers: a step that takes long is at work, and not to be taken for wedged."""
        now = time.monotonic()
        if now - self._last_snapshot_s >= SNAPSHOT_IDLE_S:
            self._send_snapshot(now)

    def _snapshot(self, now: float) -> None:
        if now - self._measured_s >= MEMORY_EVERY_S:
            self._memory = self._engine.meter.measure()
            self._measured_s = now
            self._guard_memory()
        if not self._engine.core.has_work:
            self._engine.cache.ledger.check()
        self._send_snapshot(now)

    def _send_snapshot(self, now: float) -> None:
        self._last_snapshot_s = now
        self._channel.send(take_snapshot(self._engine, self._meter, self._memory, self._memory_shrinks, now))

    def _guard_memory(self) -> None:
        ledger, budget = self._engine.cache.ledger, self._engine.info.memory_budget_bytes
        if budget is None:
            return
        used = self._memory.used_bytes
        experts = ExpertBudget(
            ledger.budget_bytes,
            ledger.resident_bytes + ledger.loading_bytes,
            ledger.minimum_bytes,
            self._planned_experts,
        )
        guarded = guarded_expert_budget(used, budget, experts)
        if guarded < ledger.budget_bytes:
            logger.warning("memory of %d bytes is above its budget of %d: experts get %d", used, budget, guarded)
            self._memory_shrinks += 1
        if guarded != ledger.budget_bytes:
            self._engine.cache.set_budget(guarded)


def take_snapshot(engine: Engine, meter: StepMeter, memory: MemoryUse, memory_shrinks: int, now: float) -> Snapshot:
    """All counters and gauges as they are between two steps or, in a long one, between two layers."""
    ledger, transfers, scheduler = engine.cache.ledger, engine.cache.transfers.stats, engine.core.scheduler
    counters = ledger.counters
    per_layer = zip(counters.hits, counters.late, counters.misses, engine.runner.activations, strict=True)
    return Snapshot(
        time_s=now,
        lookups=[LayerLookups(*layer) for layer in per_layer],
        demand_loads=counters.demand_loads,
        demand_bytes=counters.demand_bytes,
        prefetch_loads=counters.prefetch_loads,
        prefetch_bytes=counters.prefetch_bytes,
        prefetch_used=counters.prefetch_used,
        prefetch_late=counters.prefetch_late,
        prefetch_wasted=counters.prefetch_wasted,
        prefetch_cancelled=counters.prefetch_cancelled,
        prefetch_pending=counters.prefetch_pending,
        load_seconds=transfers.busy_s,
        load_failures=counters.load_failures,
        stall_seconds={"expert_wait": engine.cache.stall_s},
        evictions=dict(counters.evictions),
        expert_budget_bytes=ledger.budget_bytes,
        expert_limit_bytes=ledger.limit_bytes,
        resident_bytes=ledger.resident_bytes,
        loading_bytes=ledger.loading_bytes,
        peak_expert_bytes=ledger.peak_bytes,
        residents_by_layer=ledger.residents_by_layer(),
        memory_used_bytes=memory.used_bytes,
        memory_peak_bytes=memory.peak_bytes,
        memory_source=memory.source,
        memory_shrinks=memory_shrinks,
        dense_bytes=engine.dense_bytes,
        kv_capacity_bytes=engine.info.kv_bytes,
        kv_used_bytes=engine.pool.used_blocks * engine.storage.block_bytes,
        kv_cached_bytes=engine.pool.cached_blocks * engine.storage.block_bytes,
        prefix_cache_queries=scheduler.prefixes.num_queried if scheduler.prefixes else 0,
        prefix_cache_hits=scheduler.prefixes.num_hit if scheduler.prefixes else 0,
        kv_cache_evictions=engine.pool.num_evictions,
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        preemptions=scheduler.num_preemptions,
        steps=dict(meter.steps),
        step_seconds=meter.seconds.data(),
        step_tokens=meter.tokens.data(),
        load_latency_seconds=HistogramData(list(LATENCY_BOUNDS_S), list(transfers.latency_counts), transfers.busy_s),
    )
