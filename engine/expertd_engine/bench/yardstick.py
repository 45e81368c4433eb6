"""What other caches would have made of the steps that an engine ran: LRU, and one that ages as engines' do. Pure.

Steps are kept as they come and replayed when somebody asks: between windows, so that no step waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from expertd_engine.bench.replay import AgedReplay, LRUReplay
from expertd_engine.bench.routing import RoutingShape
from expertd_engine.experts.store import ExpertStore


class Replayed(NamedTuple):
    """What was met since the replay before."""

    lookups: int
    lru_misses: int
    hardness: int
    """For a cache that ages; 0 unless that was asked for."""


class Yardstick:
    """Caches of as many slots as an engine's budget buys, which follow its steps."""

    def __init__(self, store: ExpertStore, shape: RoutingShape, budget_bytes: int, *, ages: bool = False) -> None:
        """`ages`: also tell how hard routes were, see `expect`."""
        self._shape = shape
        self._slots = budget_bytes // store.index.record_bytes(0)
        holds_all = self._slots >= shape.layers * shape.experts
        self._lru = LRUReplay(self._slots, store.experts() if holds_all else ())
        self._aged: AgedReplay | None = None
        self._steps: list[Sequence[Sequence[int]]] = []
        if ages:
            self.expect()

    def expect(self) -> None:
        """From the next step on also say how hard steps were for a cache that ages, empty until now."""
        self._aged = AgedReplay(self._shape, self._slots)

    def add(self, step: Sequence[Sequence[int]]) -> None:
        """A step asked for these distinct experts, by layer."""
        self._steps.append(step)

    def drop(self) -> None:
        """Forget the steps that have not been replayed."""
        self._steps.clear()

    def replay(self) -> Replayed:
        """Follow the steps since the last call."""
        steps, self._steps = self._steps, []
        return self._follow(steps)

    def replay_each(self) -> list[Replayed]:
        """As `replay`, of one step after the other."""
        steps, self._steps = self._steps, []
        return [self._follow([step]) for step in steps]

    def _follow(self, steps: Sequence[Sequence[Sequence[int]]]) -> Replayed:
        return Replayed(
            sum(len(experts) for step in steps for experts in step),
            self._lru.feed(steps).misses,
            0 if self._aged is None else self._aged.feed(steps),
        )
