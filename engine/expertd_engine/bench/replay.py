"""Replays routes through an LRU cache: the yardstick for hit rates and transferred bytes. And through one that evicts
as engines do: how hard the routes were. Pure.

Each cache is one for the whole model, its slots shared by all layers, as in the residency ledger. A lookup is one
(expert, layer) of one step: tokens of a step that share an expert ask for it once. A step's layer is one event: what it
hits is decided against the cache as it was before, then hits become the most recent, then misses come in; otherwise an
expert could be evicted by a neighbour in the very event that uses it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from expertd_engine.bench.routing import RoutingShape
from expertd_engine.lab.events import Events
from expertd_engine.lab.rankings import LFURanking
from expertd_engine.lab.replay import CacheReplay


@dataclass(slots=True)
class Lookups:
    """What a replay, or an engine, met."""

    hits: int = 0
    misses: int = 0

    def add(self, other: Lookups) -> None:
        self.hits += other.hits
        self.misses += other.misses

    @property
    def hit_ratio(self) -> float:
        """Share of lookups that hit; 1 where there were none."""
        total = self.hits + self.misses
        return self.hits / total if total else 1.0


class LRUReplay:
    """An LRU cache of `slots` experts of any layer, which begins with `resident`. ValueError for less than one slot."""

    def __init__(self, slots: int, resident: Iterable[tuple[int, int]] = ()) -> None:
        if slots < 1:
            raise ValueError(f"{slots} slots are not enough to replay: give at least 1")
        self._slots = slots
        self._resident: OrderedDict[tuple[int, int], None] = OrderedDict.fromkeys(resident)

    def event(self, layer: int, experts: Iterable[int]) -> Lookups:
        """One layer of one step asks for the distinct `experts`."""
        resident = self._resident
        missing = []
        found = 0
        for expert in experts:
            key = (layer, expert)
            if key in resident:
                resident.move_to_end(key)
                found += 1
            else:
                missing.append(key)
        for key in missing:
            if len(resident) >= self._slots:
                resident.popitem(last=False)
            resident[key] = None
        return Lookups(found, len(missing))

    def feed(self, steps: Iterable[Sequence[Iterable[int]]]) -> Lookups:
        """Step after step, each `layers` as in `step`."""
        total = Lookups()
        for layers in steps:
            total.add(self.step(layers))
        return total

    def step(self, layers: Sequence[Iterable[int]]) -> Lookups:
        """All layers of one step in order; `layers[l]` holds the distinct experts of layer l."""
        total = Lookups()
        for layer, experts in enumerate(layers):
            total.add(self.event(layer, experts))
        return total


class AgedReplay:
    """A cache of `slots` experts of any layer that goes by aged frequency, as an engine does that foresees nothing.

    What it misses tells how hard routes were, whatever the engine did. Empty at first. ValueError for fewer than two
    slots.
    """

    def __init__(self, shape: RoutingShape, slots: int) -> None:
        none = np.zeros(0, np.int64)
        events = Events(none, none.astype(np.bool_), none, none, none, shape.experts, shape.layers, shape.top_k)
        self._cache, self._width = CacheReplay(events.total, slots, LFURanking(events)), shape.experts
        self._number = 0

    def feed(self, steps: Iterable[Sequence[Iterable[int]]]) -> int:
        """Step after step, each with the distinct experts of all layers: how hard they were. A layer's misses count one
        each, and one more for having any: it cannot run on.
        """
        hardness = 0
        for layers in steps:
            for layer, experts in enumerate(layers):
                flat = np.fromiter(experts, np.int64) + layer * self._width
                missing = self._cache.event(self._number, flat, None)
                hardness += missing + (missing > 0)
                self._number += 1
        return hardness


def lru_lookups(steps: Iterable[tuple[bool, Sequence[Iterable[int]]]], slots: int) -> Lookups:
    """Replay `steps`, each `(counted, layers)`, from an empty cache; what the counted ones met."""
    cache = LRUReplay(slots)
    total = Lookups()
    for counted, layers in steps:
        met = cache.step(layers)
        if counted:
            total.add(met)
    return total
