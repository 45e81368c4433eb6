"""What must hold in every simulated world, each law apart from the world and from the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expertd_engine.experts.events import (
    Abort,
    Cancel,
    Cancelled,
    Demand,
    Denied,
    Drop,
    Event,
    ExpertId,
    Failed,
    Granted,
    Instruction,
    Load,
    Loaded,
    Priority,
    Release,
    SetBudget,
)
from expertd_engine.experts.ledger import Ledger
from expertd_engine.messages import Steps, Submit
from expertd_engine.snapshot import Snapshot
from expertd_server.engine_metrics import EngineCounters
from simulation.device import UNIT, SimSlab, Violation
from simulation.model import Reference, Shape, choose, logprob_of


class WatchedLedger(Ledger):
    """The ledger itself, with somebody who looks over its shoulder."""

    watcher: LedgerChecker | None = None

    def handle_all(self, events: Iterable[Event]) -> list[Instruction]:
        events = list(events)
        if self.watcher is not None:
            for event in events:
                self.watcher.event(event)
        out = super().handle_all(events)
        if self.watcher is not None:
            self.watcher.instructions(out)
        return out


class LedgerChecker:
    """Leases, loads and bytes as a reader of the contract believes them, from the messages and the device alone."""

    def __init__(self, ledger: Ledger, slab: SimSlab, shape: Shape) -> None:
        self._ledger, self._slab, self._shape = ledger, slab, shape
        self._asked: dict[int, ExpertId] = {}
        self._held: dict[int, int] = {}
        """Slot by granted lease."""
        self._flights: dict[int, Load] = {}
        self._doomed: set[int] = set()
        """Loads that were given up; what they bring may stay, but need not."""
        self._place: dict[ExpertId, int] = {}
        """Slot by resident expert."""
        self._left: dict[ExpertId, int] = {}
        """Slots whose expert was loaded into another one: to be given up before the handling of the event ends."""
        self._allowed = ledger.budget_bytes
        self.loaded = 0
        self.loaded_bytes = 0
        self.failed = 0

    # ------------------------------------------------------------ what is said

    def event(self, event: Event) -> None:
        match event:
            case Demand(lease_id, expert):
                self._asked[lease_id] = expert
            case Release(lease_id):
                del self._held[lease_id]
            case Abort(lease_ids):
                for lease_id in lease_ids:
                    self._asked.pop(lease_id, None)
                    self._held.pop(lease_id, None)
            case SetBudget(budget_bytes) if self._ledger.minimum_bytes <= budget_bytes <= self._ledger.max_budget_bytes:
                if not self._asked:  # who waits for room may still be given it within the old limit
                    self._allowed = min(self._allowed, self._charged())
                self._allowed = max(budget_bytes, self._allowed)
            case Loaded(load_id):
                load = self._flights.pop(load_id)
                if load_id not in self._doomed:
                    self._place[load.expert] = load.slot
                self.loaded += 1
                self.loaded_bytes += self._shape.record_bytes[load.expert.layer]
            case Failed(load_id):
                del self._flights[load_id]
                self.failed += 1
            case Cancelled(load_id):
                del self._flights[load_id]
            case _:
                pass

    def instructions(self, out: Sequence[Instruction]) -> None:
        """Before they are carried out: what they do to slots, in their order."""
        self._left.clear()
        for instruction in out:
            match instruction:
                case Load():
                    self._load(instruction)
                case Granted(lease_id, expert, slot):
                    del self._asked[lease_id]
                    self._held[lease_id] = slot
                    self._place[expert] = slot
                case Cancel(load_id):
                    self._doomed.add(load_id)
                case Denied(lease_id):
                    del self._asked[lease_id]
                case Drop(slot, keep_bytes):
                    self._overwritten(slot, "returned")
                    if not keep_bytes:
                        self._forget(slot)
                case _:
                    pass
        if self._left:
            raise Violation(f"law 3: loaded twice, by expert and first slot: {self._left}")

    def _load(self, load: Load) -> None:
        flying = {flight.expert: flight for flight in self._flights.values()}
        if load.expert in flying:
            raise Violation(f"law 3: {load.expert} is loaded twice at once")
        self._overwritten(load.slot, "overwritten")
        self._forget(load.slot)
        if load.expert in self._place:
            self._left[load.expert] = self._place.pop(load.expert)
        self._flights[load.load_id] = load
        if load.priority is Priority.PREFETCH:
            starved = [expert for expert in self._asked.values() if expert not in flying and expert not in self._place]
            if starved:
                raise Violation(f"law 4: a prefetch of {load.expert} begins while {starved[0]} is waited for")

    def _overwritten(self, slot: int, how: str) -> None:
        if slot in self._held.values():
            raise Violation(f"law 2: slot {slot} is {how} under a lease")

    def _forget(self, slot: int) -> None:
        for places in (self._place, self._left):
            for expert in [expert for expert, place in places.items() if place == slot]:
                del places[expert]

    # ------------------------------------------------------------ what is there

    def _charged(self) -> int:
        return self._slab.committed * UNIT

    def bytes_now(self) -> None:
        """Law 1, at this instant, by what the device has committed."""
        budget, charged = self._ledger.budget_bytes, self._charged()
        if charged <= budget:
            self._allowed = budget
        if charged > self._allowed:
            raise Violation(f"law 1: {charged} bytes committed, {self._allowed} allowed, budget {budget}")

    def at_idle(self) -> None:
        """No lease, and the ledger's counters are what was seen."""
        self._ledger.check()
        counters = self._ledger.counters
        if self._asked or self._held:
            raise Violation(f"law 3: leases outlive their step: asked {self._asked}, held {self._held}")
        seen = (self.loaded, self.loaded_bytes, self.failed)
        counted = (
            counters.demand_loads + counters.prefetch_loads,
            counters.demand_bytes + counters.prefetch_bytes,
            counters.load_failures,
        )
        if seen != counted:
            raise Violation(f"law 6: loads, bytes and failures {counted} are counted, {seen} were seen")
        if self._ledger.resident_bytes + self._ledger.loading_bytes != self._charged():
            raise Violation(f"law 6: {self._charged()} bytes are committed, the ledger has others")
        for expert, slot in self._place.items():
            if self._slab.read(slot, self._shape.pieces[expert.layer]) != self._shape.records[expert]:
                raise Violation(f"slot {slot} does not hold {expert}")


@dataclass
class Expected:
    """A request and what it must bring."""

    message: Submit
    submitted_step: int
    shape: Shape
    max_length: int
    eos: frozenset[int]
    invariant: bool
    """Its tokens do not depend on the budget: it is computed in exact mode."""
    states: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    may: set[str] = field(default_factory=lambda: {"stop", "length"})
    """Reasons that it may end with."""
    got: list[int] = field(default_factory=list)
    got_scores: Sequence[Any] | None = None
    ended: str | None = None

    def __post_init__(self) -> None:
        reference = Reference(self.shape)
        prompt = self.prompt
        self.states = [reference.next_state(token, position) for position, token in enumerate(prompt)]
        sampling, token = self.message.sampling, None
        state = self.states[-1]
        while len(prompt) + len(self.tokens) < self.max_length and token not in self.eos:
            token = choose(state, self.eos if len(self.tokens) < sampling.min_tokens else frozenset())
            state = reference.next_state(token, len(prompt) + len(self.tokens))
            self.tokens.append(token)

    @property
    def prompt(self) -> list[int]:
        return self.message.inputs[0].token_ids

    @property
    def cost(self) -> int:
        """Steps of one token that it takes."""
        return len(self.prompt) + self.message.sampling.max_tokens

    def check_end(self) -> None:
        """Its tokens are those of an infinite budget without hints, all of them or as many as came."""
        if self.ended not in self.may:
            raise Violation(f"request {self.message.sequence_id} ended with {self.ended}, which only {self.may} may")
        if not self.invariant:
            return
        complete = self.ended in ("stop", "length")
        expected = self.tokens if complete else self.tokens[: len(self.got)]
        if self.got != expected:
            raise Violation(f"request {self.message.sequence_id} ({self.ended}) said {self.got}, not {expected}")
        if self.message.sampling.prompt_logprobs is not None and (complete or self.got_scores is not None):
            self._check_scores()

    def _check_scores(self) -> None:
        scores = [entry and (entry.token_id, entry.logprob) for entry in self.got_scores or ()]
        expected = [None, *((t, logprob_of(s)) for t, s in zip(self.prompt[1:], self.states, strict=False))]
        if scores != expected:
            raise Violation(f"request {self.message.sequence_id} scored its prompt {scores}, not {expected}")


class RequestChecker:
    """Each request ends once, with a reason it may have, with the right tokens, and not too late."""

    def __init__(self) -> None:
        self.live: dict[int, Expected] = {}
        self.ended: dict[int, Expected] = {}

    def submitted(self, request: Expected) -> None:
        self.live[request.message.sequence_id] = request

    def told(self, steps: Steps) -> None:
        for output in steps.outputs:
            request = self.live.get(output.sequence_id)
            if request is None:
                raise Violation(f"request {output.sequence_id} said more after its end")
            request.got += output.token_ids
            if output.prompt_logprobs is not None:
                if request.got_scores is not None:
                    raise Violation(f"request {output.sequence_id} scored its prompt twice")
                request.got_scores = output.prompt_logprobs
        for finished in steps.finished:
            self.end(finished.sequence_id, finished.reason)

    def end(self, sequence_id: int, reason: str) -> None:
        request = self.live.pop(sequence_id, None)
        if request is None:
            raise Violation(f"request {sequence_id} ended twice, or never began")
        request.ended = reason
        request.check_end()
        self.ended[sequence_id] = request

    def not_too_late(self, step: int, ageing_steps: int, mode_turns: int, faults: int) -> None:
        """Fairness: a request waits for those before it in rank or in time, never for all that come later.

        Each step, the first in rank of the mode whose turn it is gets on by a token at least.
        """
        requests = [*self.live.values(), *self.ended.values()]
        for late in self.live.values():
            rank = late.message.priority * ageing_steps + late.submitted_step
            before = [
                request.cost
                for request in requests
                if request.submitted_step <= late.submitted_step
                or request.message.priority * ageing_steps + request.submitted_step <= rank
            ]
            bound = 20 + mode_turns * sum(before) + faults
            if step - late.submitted_step > bound:
                raise Violation(f"request {late.message.sequence_id} still lives after {bound} steps")


class CounterChecker:
    """What `/metrics` shows never falls, whatever becomes of engines."""

    def __init__(self) -> None:
        self.counters = EngineCounters()
        self._before: Mapping[tuple[str, tuple[str, ...]], float] = {}

    def observe(self, snapshot: Snapshot) -> None:
        self.counters.observe(snapshot)
        self.check()

    def check(self) -> None:
        now = self.counters.totals()
        fallen = [name for name, value in self._before.items() if now.get(name, 0.0) < value]
        if fallen:
            raise Violation(f"counters fell: {fallen}")
        self._before = now
