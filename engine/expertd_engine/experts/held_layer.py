"""Sets in virtual mode by layer: who is held, who is coming for whom, what everybody was wanted for of late. Pure.

Owner: `VirtualExperts`, which says when somebody comes or goes; here is known who is best outside and worst inside.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_LEAST = 1e-300

GONE = -1
"""In a victim's place: it has left already."""


@dataclass(slots=True)
class HeldLayer:
    """One layer's sets: an expert is held, coming or outside. Best and worst are kept, not sought, at each token."""

    prior: Sequence[float]
    scores: memoryview[float]
    """By expert. Side by side in memory: each token meets them all after a step has gone over the caches."""
    slots: int = 0
    held: set[int] = field(default_factory=set)
    coming: dict[int, int | None] = field(default_factory=dict)
    """Newcomer → the held expert it replaces, or `GONE`; None: it fills a free slot."""
    keeps: bool = True
    """Best and worst are kept; else they are sought whenever somebody asks, and `observed` need not be called."""
    barred: set[int] = field(default_factory=set)
    """Could not be loaded, and may not have been observed since: asking again at once would ask for ever."""
    _best: int | None = None
    _worst: int | None = None
    _known: bool = False
    """Whether `_best` and `_worst` are right."""
    is_as_told: bool = False
    """Nobody has come or gone since somebody who keeps account of that put this here."""

    @property
    def free(self) -> int:
        vacant = self.slots - len(self.held)
        return vacant - sum(victim in (None, GONE) for victim in self.coming.values()) if self.coming else vacant

    def rank(self, expert: int) -> tuple[float, float]:
        return self.scores[expert], self.prior[expert]

    def outside(self) -> list[int]:
        inside = self.held.union(self.coming, self.still_barred())
        return [expert for expert in range(len(self.prior)) if expert not in inside]

    def still_barred(self) -> set[int]:
        """Those of whom nothing has been observed since."""
        return {expert for expert in self.barred if not self.scores[expert]} if self.barred else self.barred

    def victims(self) -> set[int]:
        """Held, and not being replaced already."""
        return self.held.difference(self.coming.values())

    def observe(self, experts: Iterable[int], values: Iterable[float], unit: float) -> None:
        """Add to scores the values, of which one counts for so much."""
        if self._known or self.barred:
            for expert, value in zip(experts, values, strict=True):
                self._add(expert, value * unit)
        else:  # nobody's place depends on it
            scores = self.scores
            for expert, value in zip(experts, values, strict=True):
                scores[expert] += value * unit

    def observed(self) -> None:
        """Others have added to scores."""
        self._known = False
        self.barred = self.still_barred()

    def divide(self, by: float) -> None:
        """Count all scores in a larger unit."""
        for expert, score in enumerate(self.scores):
            self.scores[expert] = score / by

    def _add(self, expert: int, value: float) -> None:
        score = self.scores[expert] = self.scores[expert] + value
        if expert in self.barred:
            self.barred.remove(expert)
            self._known = False
        if not self._known:
            return
        if expert == self._worst:
            self._known = False
            return
        is_outside = expert not in self.held and expert not in self.coming
        if is_outside and self._best is not None and (score, self.prior[expert]) > self.rank(self._best):
            self._best = expert

    def changed(self) -> None:
        """A set has changed."""
        self._known = self.is_as_told = False

    @property
    def is_to_be_sought(self) -> bool:
        """Whether best and worst are yet unknown, and depend on scores and sets alone."""
        return not self._known and self.keeps and not self.barred

    def know(self, best: int | None, worst: int | None) -> None:
        """What is found out of many layers at once."""
        self._best, self._worst, self._known = best, worst, True

    def best(self) -> int | None:
        """Of the experts outside."""
        self._seek()
        return self._best

    def worst(self) -> int | None:
        """Of the victims."""
        self._seek()
        return self._worst

    def gain(self) -> float:
        """What a swap would win."""
        best, worst = self.best(), self.worst()
        if best is None or worst is None:
            return 0.0
        return self.scores[best] - self.scores[worst]

    def _seek(self) -> None:
        if not self._known or not self.keeps:
            self._best = max(self.outside(), key=self.rank, default=None)
            self._worst = min(self.victims(), key=self.rank, default=None)
            self._known = True


class Spare:
    """Who of a layer may go as a step begins. An expert is worth the share of the layer's weight that it will have, and
    that it had of late."""

    def __init__(self, layer: HeldLayer, expected: Sequence[float]) -> None:
        scores = self._scores = layer.scores
        total = self._total = max(sum(scores), _LEAST)
        self._expected = expected
        worth = [(expected[expert] + scores[expert] / total, expert) for expert in layer.victims()]
        self._victims = sorted(worth, reverse=True)

    def give_way_to(self, newcomer: int, factor: float) -> int | None:
        """Whoever is worth least, if the newcomer is worth more than so many times that."""
        worth = self._expected[newcomer] + self._scores[newcomer] / self._total
        if not self._victims or worth <= self._victims[-1][0] * factor:
            return None
        return self._victims.pop()[1]


class HeldLayers:
    """The sets of all layers, and what can be asked of them at any time. `keeps`: as of `HeldLayer`."""

    def __init__(self, priors: Sequence[Sequence[float]], top_k: int, *, keeps: bool) -> None:
        self.priors = priors
        self.top_k = top_k
        self.width = max(map(len, priors))
        self.scores = array("d", bytes(8 * len(priors) * self.width))
        """`[L, width]`: who adds to them says so by `observed`."""
        self.unit = 1.0
        """What an observation made now counts for: scores are never aged, the unit grows instead."""
        rows = memoryview(self.scores).cast("B").cast("d")
        self._layers = [
            HeldLayer(p, rows[n * self.width : n * self.width + len(p)], keeps=keeps) for n, p in enumerate(priors)
        ]
        self._loading = 0

    @property
    def layers(self) -> Sequence[HeldLayer]:
        """For whoever seeks in all of them at once."""
        return self._layers

    @property
    def slots(self) -> list[int]:
        """By layer; zeros while there are no sets."""
        return [layer.slots for layer in self._layers]

    @property
    def is_open(self) -> bool:
        return any(layer.slots for layer in self._layers)

    @property
    def is_ready(self) -> bool:
        """Whether every layer holds enough for a token."""
        return all(len(layer.held) >= self.top_k for layer in self._layers)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is on its way."""
        return self._loading == 0

    def held(self, layer: int) -> frozenset[int]:
        return frozenset(self._layers[layer].held)

    def to_be_held(self, layer: int) -> frozenset[int]:
        """Who will be held there once all that is on its way has come."""
        return frozenset(self._layers[layer].victims().union(self._layers[layer].coming))

    def holds(self, layer: int, experts: Iterable[int]) -> bool:
        """Whether it holds them."""
        return self._layers[layer].held.issuperset(experts)

    def holds_all(self, layer: int) -> bool:
        """Whether nobody can be missed there."""
        return len(self._layers[layer].held) == len(self._layers[layer].prior)

    def score(self, layer: int, expert: int) -> float:
        """Its windowed score, an observation made now counting in full."""
        return self._layers[layer].scores[expert] / self.unit
