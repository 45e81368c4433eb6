"""The engine's loop over a real socket and a tiny engine: messages in, messages out, counters that agree."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from expertd_engine import loop
from expertd_engine.experts.store import ExpertStore
from expertd_engine.histogram import Histogram
from expertd_engine.loop import Channel, EngineLoop
from expertd_engine.messages import (
    Abort,
    BudgetSet,
    ExpertMap,
    Finished,
    Output,
    Sampling,
    SetBudget,
    Shutdown,
    Steps,
    Submit,
    TextInput,
    ToEngine,
    ToServer,
    Watch,
)
from expertd_engine.prepare import prepare
from expertd_engine.reporting import StepMeter
from expertd_engine.snapshot import HistogramData, LayerLookups, Snapshot
from expertd_engine.startup import Engine, start_engine
from support.engine import make_config
from support.tiny_mixtral import make_mixtral

WAIT_MS = 20_000


def test_a_histogram_counts_by_upper_bound_inclusive() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    for value in (0.5, 1.0, 1.5, 2.0, 4.0, 4.5):
        histogram.add(value)
    assert histogram.data() == HistogramData([1.0, 2.0, 4.0], [2, 2, 1, 1], 13.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    make_mixtral(folder / "source", num_hidden_layers=2)
    prepare(folder / "source", folder / "store", "bf16")
    return folder / "store"


class Server:
    """The server's end of the socket, and the loop in a thread of its own."""

    def __init__(self, store: Path, endpoint: str) -> None:
        meters: list[StepMeter] = []

        def wrap(forward: Callable[..., object]) -> StepMeter:
            meters.append(StepMeter(forward))  # type: ignore[arg-type]  # the runner
            return meters[0]

        config = make_config(expert_budget="50%", max_model_len=64)
        self.engine: Engine = start_engine(ExpertStore.open(store), config, os.getpid(), lambda s, f: None, wrap)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToServer)
        self.snapshots: list[Snapshot] = []
        self._channel = Channel(endpoint)
        self.thread = threading.Thread(target=EngineLoop(self.engine, meters[0], self._channel).run)
        self.thread.start()

    def send(self, message: ToEngine) -> None:
        self._socket.send(self._encoder.encode(message))

    def receive(self) -> ToServer:
        """The next message that is no snapshot; those are kept."""
        while isinstance(message := self._next(), (Snapshot, ExpertMap)):
            if isinstance(message, Snapshot):
                self.snapshots.append(message)
        return message

    def snapshot(self) -> Snapshot:
        """The next one."""
        while not isinstance(message := self._next(), Snapshot):
            assert isinstance(message, ExpertMap)
        return message

    def _next(self) -> ToServer:
        message: ToServer = self._decoder.decode(self._socket.recv())
        return message

    def until_map(self, what: Callable[[ExpertMap], bool]) -> ExpertMap:
        """The first map of which `what` is true; everything else is passed over."""
        end_s = time.monotonic() + WAIT_MS / 1000
        while not (isinstance(message := self._next(), ExpertMap) and what(message)):
            assert time.monotonic() < end_s, "no such map came"
        return message

    def until_finished(self, count: int) -> tuple[list[Output], list[Finished]]:
        outputs: list[Output] = []
        finished: list[Finished] = []
        while len(finished) < count:
            steps = self.receive()
            assert isinstance(steps, Steps)
            outputs += steps.outputs
            finished += steps.finished
        return outputs, finished

    def close(self) -> None:
        if self.thread.is_alive():
            self.send(Shutdown())
            self.thread.join(WAIT_MS / 1000)
        self._channel.close()
        self._socket.close()
        self._context.term()


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(store, f"ipc://{tmp_path_factory.mktemp('ipc')}/s")
    yield running
    running.close()


def submit(sequence_id: int, max_tokens: int) -> Submit:
    return Submit(sequence_id, [TextInput([1, 2, 3])], Sampling(max_tokens=max_tokens, ignore_eos=True, temperature=0))


def test_sequences_run_to_their_end(server: Server) -> None:
    server.send(submit(1, 5))
    server.send(submit(2, 5))
    outputs, finished = server.until_finished(2)
    tokens = {i: [t for o in outputs if o.sequence_id == i for t in o.token_ids] for i in (1, 2)}
    assert len(tokens[1]) == 5 and tokens[1] == tokens[2]
    assert [(f.sequence_id, f.reason) for f in sorted(finished, key=lambda f: f.sequence_id)] == [
        (1, "length"),
        (2, "length"),
    ]


def test_one_that_can_never_run_is_answered_and_so_is_an_abort(server: Server) -> None:
    server.send(Submit(3, [TextInput(list(range(65)))], Sampling()))
    server.send(submit(4, 60))
    server.send(Abort([4, 999]))
    _, finished = server.until_finished(2)
    reasons = {f.sequence_id: f.reason for f in finished}
    assert reasons == {3: "error", 4: "abort"}


def test_a_budget_is_set_or_refused_with_the_reason(server: Server) -> None:
    info = server.engine.info
    server.send(SetBudget(1))
    refused = server.receive()
    assert isinstance(refused, BudgetSet) and refused.error is not None
    assert refused.expert_budget_bytes == info.expert_budget_bytes
    assert str(info.minimum_expert_budget_bytes) in refused.error
    server.send(SetBudget(info.expert_bytes_total + 1))
    too_much = server.receive()
    assert isinstance(too_much, BudgetSet) and too_much.error is not None
    server.send(SetBudget(info.minimum_expert_budget_bytes))
    assert server.receive() == BudgetSet(info.minimum_expert_budget_bytes, info.minimum_expert_budget_bytes)


def test_a_budget_that_shrinks_while_requests_run_ends_none_of_them(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = server.engine.info
    server.send(SetBudget(info.expert_bytes_total))
    assert server.receive() == BudgetSet(info.expert_bytes_total, info.expert_bytes_total)
    server.send(submit(10, 40))
    expected, _ = server.until_finished(1)
    in_step, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        in_step.set()
        assert go_on.wait(WAIT_MS / 1000)

    monkeypatch.setattr(server.engine.cache, "pulse", pause)
    server.send(submit(11, 40))
    assert in_step.wait(WAIT_MS / 1000)
    server.send(SetBudget(info.minimum_expert_budget_bytes))
    go_on.set()
    told = [server.receive()]
    while not (isinstance(told[-1], Steps) and told[-1].finished):
        told.append(server.receive())
    assert BudgetSet(info.minimum_expert_budget_bytes, info.minimum_expert_budget_bytes) in told, (
        "the budget changed before the request ended"
    )
    outputs = [output for one in told if isinstance(one, Steps) for output in one.outputs]
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert server.engine.cache.ledger.resident_bytes <= info.minimum_expert_budget_bytes


def test_a_long_step_sends_signs_of_life(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    before = server.snapshot()
    monkeypatch.setattr(loop, "SNAPSHOT_IDLE_S", 0.0)  # as if every layer took longer
    server.snapshots.clear()
    server.send(submit(12, 1))
    server.until_finished(1)
    assert [s for s in server.snapshots if s.running == 1 and s.steps == before.steps], "none came inside the step"


def test_a_snapshot_at_idle_agrees_with_itself_and_the_engine(server: Server) -> None:
    server.send(submit(5, 3))
    server.until_finished(1)
    snapshot = server.snapshot()
    info = server.engine.info
    assert snapshot.running == snapshot.waiting == snapshot.kv_used_bytes == 0
    assert snapshot.steps["prefill"] >= 1 and snapshot.steps["decode"] >= 2
    for phase, count in snapshot.steps.items():
        assert sum(snapshot.step_seconds[phase].counts) == sum(snapshot.step_tokens[phase].counts) == count
    assert sum(snapshot.load_latency_seconds.counts) == snapshot.demand_loads + snapshot.prefetch_loads
    assert len(snapshot.lookups) == len(snapshot.residents_by_layer) == info.num_moe_layers
    assert snapshot.read_bytes == snapshot.demand_bytes + snapshot.prefetch_bytes
    ended = snapshot.prefetch_used + snapshot.prefetch_late + snapshot.prefetch_wasted + snapshot.prefetch_cancelled
    assert snapshot.prefetch_issued == ended + snapshot.prefetch_pending
    assert all(
        layer.hit <= layer.hit_activations and layer.miss <= layer.miss_activations for layer in snapshot.lookups
    )
    assert all(layer.covered <= layer.hit + layer.late + layer.miss for layer in snapshot.lookups)
    tokens = sum(histogram.total for histogram in snapshot.step_tokens.values())
    assert [pairs(layer) for layer in snapshot.lookups] == [tokens * info.top_k] * info.num_moe_layers
    assert snapshot.resident_bytes == sum(snapshot.residents_by_layer) * info.expert_record_bytes
    assert snapshot.resident_bytes + snapshot.loading_bytes <= snapshot.expert_limit_bytes
    assert snapshot.stall_seconds.keys() == snapshot.step_stall_seconds.keys() == {"disk_read", "expert_wait"}
    assert all(snapshot.step_stall_seconds[c].total == pytest.approx(s) for c, s in snapshot.stall_seconds.items())
    assert snapshot.memory_used_bytes > 0


def pairs(layer: LayerLookups) -> int:
    return layer.hit_activations + layer.late_activations + layer.miss_activations


def test_maps_are_drawn_inside_steps_while_somebody_looks(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between steps nothing is leased, so a map with leases was drawn inside one."""
    monkeypatch.setattr(loop, "MAP_EVERY_S", 0.0)
    server.send(Watch(WAIT_MS / 1000))
    server.send(submit(7, 20))
    seen = server.until_map(lambda experts: "L" in "".join(experts.layers))
    info = server.engine.info
    assert [len(layer) for layer in seen.layers] == [info.num_experts] * info.num_moe_layers
    server.until_finished(1)
    idle = server.until_map(lambda experts: "L" not in "".join(experts.layers))
    assert "r" in "".join(idle.layers)
    server.send(Watch(0.0))


def test_shutdown_ends_the_loop_and_whatever_runs_is_told_its_end(server: Server) -> None:
    server.send(submit(6, 60))
    server.send(Shutdown())
    _, finished = server.until_finished(1)
    assert [(f.sequence_id, f.reason) for f in finished] == [(6, "abort")]
    server.thread.join(WAIT_MS / 1000)
    assert not server.thread.is_alive()
