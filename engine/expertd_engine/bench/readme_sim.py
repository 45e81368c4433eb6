"""The engine's own core, scheduler, ledger and lookahead over a simulated box: steps and reads take virtual time.

Deterministic: the same trace, costs and arm give the same latencies. What decides is what serves; only the forward pass
(recorded tokens and experts, costs measured on a box) and the transfer threads are stood in for.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from heapq import heappop, heappush

from expertd_engine.batching import Batching, PacedRoom
from expertd_engine.bench.readme_traces import Arrival, Recorded
from expertd_engine.bench.virtual_clock import Clock
from expertd_engine.config import Policy
from expertd_engine.core import EngineCore, SampledToken, StepResult
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.events import Cancelled, Load, Loaded, Priority
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.lookahead import NoLookahead
from expertd_engine.experts.policy import make_policy
from expertd_engine.experts.pregated import PregatedLookahead, later_unions, step_union
from expertd_engine.kv_pool import KVPool
from expertd_engine.messages import Sampling, Steps, Submit, TextInput
from expertd_engine.paths import Paths, PathShape, Routes
from expertd_engine.request import Sequence as EngineSequence
from expertd_engine.scheduler import Scheduler
from expertd_engine.step_plan import SchedulerLimits, StepPlan

RECORD = 4096
"""Bytes of a simulated record: all are alike, so that any number does."""
_ONE_HEAD = PathShape(1, 1)


@dataclass(frozen=True, slots=True)
class Costs:
    """Of a box. A step costs `step_s`, each of its rows `row_s`, and each expert that any layer uses `expert_s`; a read
    takes `read_s` with `readers` at once. Seconds."""

    layers: int
    experts: int
    step_s: float
    row_s: float
    expert_s: float
    read_s: float
    readers: int

    def folded(self, layers: int) -> Costs:
        """The same with fewer layers, each of which stands for several: that is quicker to simulate."""
        return replace(self, layers=layers, read_s=self.read_s * self.layers / layers)

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve."""

    batching: Batching
    policy: Policy
    prefetch: bool

    @property
    def name(self) -> str:
        return f"{self.batching}, {self.policy}, {'prefetch' if self.prefetch else 'on demand'}"


@dataclass(frozen=True, slots=True)
class Room:
    """`slots` are experts of any layer; sequences, tokens in one step, and steps that one may be passed over."""

    slots: int
    max_sequences: int
    max_step_tokens: int
    patience: int


@dataclass(slots=True)
class Outcome:
    """What a run met. Latencies of each request in seconds, in the order of arrival."""

    per_token_s: list[float] = field(default_factory=list)
    """From arrival to the last token, over the tokens of the answer."""
    first_token_s: list[float] = field(default_factory=list)
    hits: int = 0
    lookups: int = 0
    steps: int = 0
    full_steps: int = 0
    unique: int = 0
    """Experts of full steps (of one layer), summed."""
    passed_over: int = 0
    """The most steps in a row."""
    uses: list[frozenset[int]] = field(default_factory=list)
    """Experts of each step."""


class _Completions:
    """Stands where `Transfers` has its queue: whoever waits lets virtual time pass."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.arrived: deque[Loaded | Cancelled] = deque()

    def empty(self) -> bool:
        return not self.arrived

    def get(self, timeout: float | None = None) -> Loaded | Cancelled:
        """`timeout` never passes."""
        while not self.arrived:
            if not self._clock.run_next():
                raise RuntimeError("a step waits for a load, and none is under way")
        return self.arrived.popleft()


class SimReads:
    """Stands where `Transfers` stands: `readers` at once, demands before prefetches, each `read_s` long."""

    def __init__(self, clock: Clock, read_s: float, readers: int) -> None:
        self.completions = _Completions(clock)
        self._clock, self._read_s, self._idle = clock, read_s, readers
        self._queues: dict[Priority, deque[int]] = {Priority.DEMAND: deque(), Priority.PREFETCH: deque()}

    def submit(self, load: Load, view: object) -> None:
        self._queues[load.priority].append(load.load_id)
        self._begin()

    def promote(self, load_id: int) -> None:
        if load_id in self._queues[Priority.PREFETCH]:
            self._queues[Priority.PREFETCH].remove(load_id)
            self._queues[Priority.DEMAND].append(load_id)

    def cancel(self, load_id: int) -> None:
        for queue in self._queues.values():
            if load_id in queue:
                queue.remove(load_id)
                self.completions.arrived.append(Cancelled(load_id))

    def _begin(self) -> None:
        for queue in self._queues.values():
            while queue and self._idle:
                self._idle -= 1
                load_id = queue.popleft()
                self._clock.at(self._read_s, partial(self._end, load_id))

    def _end(self, load_id: int) -> None:
        self._idle += 1
        self.completions.arrived.append(Loaded(load_id))
        self._begin()


class _NoMemory:
    """Stands where the slab stands."""

    def view(self, slot: int, num_bytes: int) -> None:
        return None

    def drop(self, slot: int, keep_bytes: int) -> None:
        return None


class Simulation:
    """One trace through one arm."""

    def __init__(self, costs: Costs, arm: Arm, room: Room) -> None:
        self.clock = Clock()
        self.outcome = Outcome()
        self._costs, self._room = costs, room
        self._exchanges: dict[int, Recorded] = {}
        ledger = Ledger(
            [RECORD] * costs.layers, [costs.experts] * costs.layers, room.slots * RECORD,
            make_policy(arm.policy, costs.layers), prefetch=arm.prefetch, prefetch_depth=2 * costs.readers,
        )  # fmt: skip
        self._pregated = PregatedLookahead(costs.layers, costs.experts, ledger.resident_slots)
        lookahead = NoLookahead() if arm.policy == "lru" and not arm.prefetch else self._pregated
        reads = SimReads(self.clock, costs.read_s, costs.readers)
        self.cache = ExpertCache(ledger, _NoMemory(), reads, lookahead, [RECORD] * costs.layers)  # type: ignore[arg-type]  # neither is the real class; they have what the cache uses of it
        limits = SchedulerLimits(
            room.max_sequences, room.max_step_tokens, 1 << 20, patience_steps=room.patience
        )  # fmt: skip
        slots = max(1, room.slots // costs.layers)
        self._paced = PacedRoom(lambda: slots, RECORD * costs.layers)
        self._scheduler = Scheduler(limits, KVPool(1 << 16, 16), None, arm.batching, self._paced)
        self._core = EngineCore(self._scheduler, self._forward, (), foresee=self._foresee)

    def run(self, trace: Sequence[Arrival]) -> Outcome:
        """Serve all of it; requests arrive at step boundaries, as in the engine's loop."""
        began: dict[int, float] = {}
        pending = deque(enumerate(trace))
        while pending or self._core.has_work:
            if not self._core.has_work:
                self.clock.advance(max(0.0, pending[0][1].at_s - self.clock.now))
            while pending and pending[0][1].at_s <= self.clock.now:
                number, arrival = pending.popleft()
                began[number] = arrival.at_s
                self._submit(number, arrival.exchange)
            self._note(self._core.step(self.clock.now), began)
        counters = self.cache.ledger.counters
        self.outcome.hits, self.outcome.lookups = sum(counters.hits), counters.lookups()
        self.outcome.passed_over = self._scheduler.chooser.most_passed_over
        return self.outcome

    def _submit(self, number: int, exchange: Recorded) -> None:
        self._exchanges[number] = exchange
        sampling = Sampling(temperature=0, max_tokens=len(exchange.answer), ignore_eos=True)
        self._core.submit(Submit(number, [TextInput(exchange.prompt)], sampling), self.clock.now)
        self.outcome.first_token_s.append(0.0)
        self.outcome.per_token_s.append(0.0)

    def _note(self, told: Steps, began: dict[int, float]) -> None:
        for output in told.outputs:
            number = output.sequence_id
            if not self.outcome.first_token_s[number]:
                self.outcome.first_token_s[number] = self.clock.now - began[number]
        for finished in told.finished:
            number = finished.sequence_id
            latency = self.clock.now - began[number]
            self.outcome.per_token_s[number] = latency / len(self._exchanges[number].answer)

    def _foresee(self, sequences: Collection[EngineSequence]) -> None:
        for sequence in sequences:
            paths = sequence.paths = sequence.paths or Paths(_ONE_HEAD)
            experts = self._exchanges[sequence.sequence_id].experts[len(paths) : sequence.num_tokens]
            paths.extend(Routes(array("q", experts), array("f", bytes(4 * len(experts)))), 0, len(experts))

    def _forward(self, plan: StepPlan) -> StepResult:
        costs, began = self._costs, self.clock.now
        now = step_union(plan)
        self._pregated.plan(now, later_unions(plan, self._room.max_step_tokens))
        self.cache.begin_step([0] * plan.num_tokens)
        experts = sorted(now[0])
        plain_s = (costs.step_s + costs.row_s * plan.num_tokens) / costs.layers
        for layer in range(costs.layers):
            self.clock.advance(plain_s)
            self._layer(layer, experts)
        self._count(plan, now[0])
        self._tell_room(self.clock.now - began)
        sampled = {}
        for chunk in plan.chunks:
            if chunk.samples:
                sequence = chunk.sequence
                answer = self._exchanges[sequence.sequence_id].answer
                sampled[sequence.sequence_id] = SampledToken(answer[len(sequence.output_token_ids)])
        return StepResult(sampled, self.clock.now - began, experts=self.cache.end_step())

    def _layer(self, layer: int, experts: Sequence[int]) -> None:
        each_s = self._costs.expert_s / self._costs.layers
        with self.cache.lease(layer, experts) as leases:
            missing = len(experts)
            while missing:
                taken = [index for index, _ in leases.take()]
                self.clock.advance(each_s * len(taken))
                leases.release(taken)
                missing -= len(taken)

    def _tell_room(self, duration_s: float) -> None:
        counters = self.cache.ledger.counters
        read = counters.demand_bytes + counters.prefetch_bytes
        self._paced.stepped(duration_s, read, read / RECORD * self._costs.read_s / self._costs.readers)

    def _count(self, plan: StepPlan, experts: frozenset[int]) -> None:
        outcome = self.outcome
        outcome.steps += 1
        outcome.uses.append(experts)
        if plan.num_tokens == self._room.max_step_tokens:
            outcome.full_steps += 1
            outcome.unique += len(experts)


def clairvoyant_hits(uses: Sequence[frozenset[int]], layers: int, slots: int) -> tuple[int, int]:
    """Hits and lookups of `slots` slots for all layers, by who knows all steps to come (Belady)."""
    accesses = [(layer, expert) for step in uses for layer in range(layers) for expert in sorted(step)]
    following: list[int] = []
    seen: dict[tuple[int, int], int] = {}
    for place in range(len(accesses) - 1, -1, -1):
        following.append(seen.get(accesses[place], len(accesses)))
        seen[accesses[place]] = place
    resident: dict[tuple[int, int], int] = {}
    furthest: list[tuple[int, tuple[int, int]]] = []
    hits = 0
    for expert, use in zip(accesses, reversed(following), strict=True):
        if expert in resident:
            hits += 1
        else:
            while len(resident) >= slots:
                due, victim = heappop(furthest)
                if resident.get(victim) == -due:  # else it was used since
                    del resident[victim]
        resident[expert] = use
        heappush(furthest, (-use, expert))
    return hits, len(accesses)
