"""Every interleaving of a small world: a consumer that asks and releases in order, and a box that may fail.

Three experts, room for two (or, of two lengths, a little more). At each state every possible next event is tried; the
twin checks the laws, and some event that needs no luck must lead on: no deadlock, no leak, every lease ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from expertd_engine.experts.events import (
    Abort,
    Cancelled,
    Demand,
    Event,
    ExpertId,
    Failed,
    Hint,
    Loaded,
    Predict,
    Release,
    SetBudget,
    Tick,
)
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.policy import make_policy
from stateful.ledger_twin import Twin

Move = tuple[str, int]


@dataclass(frozen=True)
class Scenario:
    """`sizes[l]` is the record length of layer l's only expert; `script` lists the layers asked for, in order."""

    sizes: tuple[int, ...]
    budget: int
    other_budget: int
    script: tuple[int, ...]
    window: int
    hints: tuple[int, ...] = ()
    failures: int = 2
    aborts: int = 1
    budget_changes: int = 2
    ticks: int = 0


SCENARIOS = {
    "two slots, three experts": Scenario((1, 1, 1), 2, 3, (0, 1, 2), 3),
    "both slots taken by prefetches of what is asked last": Scenario(
        (1, 1, 1), 2, 3, (0, 1, 2), 3, hints=(1, 2), failures=1, aborts=0
    ),
    "hints that go stale": Scenario((1, 1, 1), 2, 2, (0, 1), 2, hints=(1, 2), ticks=1, budget_changes=0),
    "the same expert twice at once": Scenario((1, 1, 1), 2, 3, (0, 0, 1), 2, failures=3, budget_changes=1),
    "small records prefetched before a large one is asked for": Scenario(
        (2, 1, 1, 1, 1), 4, 4, (0, 1, 2, 3, 4), 5, hints=(1, 2, 3, 4), failures=0, aborts=0, budget_changes=0
    ),
    "three slots taken by prefetches, then two": Scenario(
        (1, 1, 1, 1), 3, 2, (0, 1, 2), 3, hints=(1, 2, 3), failures=0, aborts=0, budget_changes=1
    ),
    "two lengths, shrinking": Scenario((2, 1, 2), 4, 5, (1, 0, 2), 3, hints=(2,), failures=0),
}


@dataclass
class World:
    scenario: Scenario
    asked: int = 0
    outstanding: list[int] = field(default_factory=list)
    spent: dict[str, int] = field(
        default_factory=lambda: {"failed": 0, "abort": 0, "budget": 0, "predict": 0, "tick": 0}
    )

    def __post_init__(self) -> None:
        s = self.scenario
        ledger = Ledger(s.sizes, [1] * len(s.sizes), s.budget, make_policy("lru"), max(s.budget, s.other_budget))
        self.twin = Twin({ExpertId(layer, 0): nbytes for layer, nbytes in enumerate(s.sizes)}, ledger)

    def calm_moves(self) -> list[Move]:
        """What a healthy box and consumer can do."""
        moves = [("loaded", load_id) for load_id in self.twin.flights]
        if self.asked < len(self.scenario.script) and len(self.outstanding) < self.scenario.window:
            moves.append(("ask", self.asked))
        if self.outstanding and self.outstanding[0] not in self.twin.asked:
            moves.append(("next", self.outstanding[0]))
        return moves

    def other_moves(self) -> list[Move]:
        s, moves = self.scenario, [("cancelled", i) for i, flight in self.twin.flights.items() if flight.doomed]
        if self.spent["failed"] < s.failures:
            moves += [("failed", load_id) for load_id in self.twin.flights]
        if self.outstanding and self.spent["abort"] < s.aborts:
            moves.append(("abort", 0))
        if self.spent["budget"] < s.budget_changes:
            moves.append(("budget", s.budget if self.twin.budget == s.other_budget else s.other_budget))
        if s.hints and not self.spent["predict"]:
            moves.append(("predict", 0))
        if self.spent["tick"] < s.ticks:
            moves.append(("tick", len(s.script)))
        return moves

    def make(self, move: Move) -> None:
        name, number = move
        if name in self.spent:
            self.spent[name] += 1
        if name == "next":
            self.outstanding.pop(0)
            if number not in self.twin.granted:
                return  # denied: the consumer goes on
        self.twin.send(self._event(name, number))
        if name == "abort":
            self.outstanding.clear()

    def _event(self, name: str, number: int) -> Event:
        match name:
            case "ask":
                self.asked += 1
                self.outstanding.append(number)
                return Demand(number, ExpertId(self.scenario.script[number], 0), number)
            case "next":
                return Release(number)
            case "loaded":
                return Loaded(number)
            case "failed":
                return Failed(number, "read error")
            case "cancelled":
                return Cancelled(number)
            case "abort":
                alive = {**self.twin.asked, **self.twin.granted}
                return Abort(tuple(lease for lease in self.outstanding if lease in alive))
            case "budget":
                return SetBudget(number)
            case "predict":
                return Predict(tuple(Hint(ExpertId(layer, 0), 10 + layer) for layer in self.scenario.hints))
            case _:
                return Tick(10 + number)

    def is_done(self) -> bool:
        return self.asked == len(self.scenario.script) and not self.outstanding and not self.twin.flights

    def key(self) -> object:
        """Worlds of equal keys have equal futures."""
        t = self.twin
        flights = sorted((f.expert, f.priority, f.doomed) for f in t.flights.values())
        return (
            [t.state(e) for e in t.sizes], flights, sorted(t.asked), sorted(t.granted.items()), self.outstanding,
            self.asked, self.spent, t.budget, sorted(t.failures.items()), sorted(t.next_use.items()),
            sorted(t.prefetched), sorted(t.on_probation), t.position,
        )  # fmt: skip


def _replay(scenario: Scenario, path: tuple[Move, ...]) -> World:
    world = World(scenario)
    world.twin.thorough = False
    for move in path[:-1]:
        world.make(move)
    world.twin.thorough = True
    if path:
        world.make(path[-1])
    return world


def _explore(scenario: Scenario) -> tuple[int, int]:
    """Visit every reachable world once. Returns how many there are, and in how many all work is done."""
    seen: set[str] = set()
    done = 0
    frontier: list[tuple[Move, ...]] = [()]
    while frontier:
        path = frontier.pop()
        world = _replay(scenario, path)
        key = repr(world.key())
        if key in seen:
            continue
        seen.add(key)
        calm = world.calm_moves()
        assert calm or world.is_done(), f"deadlock after {path}"
        if world.is_done():
            done += 1
            assert world.twin.charged() <= world.twin.budget, f"law 1: bytes leak after {path}"
            assert not world.twin.asked and not world.twin.granted, f"law 3: leases leak after {path}"
        frontier += [(*path, move) for move in calm + world.other_moves()]
    return len(seen), done


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_interleaving_keeps_the_laws_and_ends(name: str) -> None:
    worlds, done = _explore(SCENARIOS[name])
    assert worlds > 100 and done > 0
