"""Small ledgers, and steps that use them, whose loads are instant."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from expertd_engine.experts.events import Demand, ExpertId, Instruction, Load, Loaded, Release
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.lookahead import Lookahead, NoLookahead
from expertd_engine.experts.policy import make_policy

A, B, C, D = (ExpertId(0, index) for index in range(4))


def make(
    slots: int = 2, experts: int = 4, policy: str = "lru", most: int | None = None, prefetch: bool = True
) -> Ledger:
    """A ledger over one layer of records of one byte."""
    return Ledger([1], [experts], slots, make_policy(policy), most, prefetch=prefetch)


class Consumer:
    """A step that asks for experts `window` ahead, uses and releases them in order; loads are instant."""

    def __init__(self, ledger: Ledger, window: int = 1, lookahead: Lookahead | None = None) -> None:
        self.ledger = ledger
        self.window = window
        self.lookahead = lookahead or NoLookahead()
        self.leases = 0

    def use(self, trace: Sequence[ExpertId], start: int = 0, scan: bool = False) -> None:
        outstanding: deque[int] = deque()
        for position, expert in enumerate(trace, start):
            next_use = self.lookahead.next_use(expert, position)
            self.handle(Demand(self.leases, expert, position, next_use, scan))
            outstanding.append(self.leases)
            self.leases += 1
            if len(outstanding) == self.window:
                self.handle(Release(outstanding.popleft()))
        for lease in outstanding:
            self.handle(Release(lease))

    def handle(self, event: Demand | Release) -> None:
        loads: deque[Instruction] = deque(self.ledger.handle(event))
        while loads:
            instruction = loads.popleft()
            if isinstance(instruction, Load):
                loads.extend(self.ledger.handle(Loaded(instruction.load_id)))

    def hit_rate(self) -> float:
        counters = self.ledger.counters
        return sum(counters.hits) / counters.lookups()


class KnownTrace(NoLookahead):
    """Exact lookahead over a given sequence of uses."""

    def __init__(self, trace: Sequence[ExpertId]) -> None:
        self.trace = trace

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return next((p for p in range(after + 1, len(self.trace)) if self.trace[p] == expert), None)


def resident(ledger: Ledger, experts: Sequence[ExpertId]) -> list[ExpertId]:
    return [expert for expert in experts if ledger.state(expert) == "resident"]


def load_of(instructions: Sequence[Instruction]) -> Load:
    return next(i for i in instructions if isinstance(i, Load))
