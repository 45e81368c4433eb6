"""SwapMoE's own search for a split of slots over layers (arXiv 2308.15030, 4): the planner's yardstick, nothing else.

Random configurations; each round mutates one layer's slots, and crosses pairs by swapping or by averaging; those over
the budget are dropped, the best live on.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from expertd_engine.planning.profile import LayerCurve

Slots = tuple[int, ...]


def genetic_split(
    curves: Sequence[LayerCurve],
    record_bytes: Sequence[int],
    room: int,
    *,
    population: int = 64,
    rounds: int = 200,
    seed: int = 0,
) -> list[int]:
    """Slots of each layer inside `room` bytes, at least the fewest of each curve."""
    search = _Search(curves, record_bytes, room, Random(seed))
    living = {search.random() for _ in range(population)}
    for _ in range(rounds):
        parents = sorted(living, key=search.loss)[: population // 2]
        children = [search.mutated(parent) for parent in parents]
        children += [search.crossed(*search.rng.sample(parents, 2)) for _ in parents if len(parents) > 1]
        living = set(parents).union(child for child in children if search.fits(child))
    fittest: Slots = min(living, key=search.loss)
    return list(fittest)


class _Search:
    def __init__(self, curves: Sequence[LayerCurve], record_bytes: Sequence[int], room: int, rng: Random) -> None:
        self.rng = rng
        self._curves = curves
        self._record_bytes = record_bytes
        self._room = room
        self._losses: dict[Slots, float] = {}

    def fits(self, slots: Slots) -> bool:
        return sum(n * nbytes for n, nbytes in zip(slots, self._record_bytes, strict=True)) <= self._room

    def loss(self, slots: Slots) -> float:
        if slots not in self._losses:
            self._losses[slots] = sum(curve.loss(n) for curve, n in zip(self._curves, slots, strict=True))
        return self._losses[slots]

    def random(self) -> Slots:
        """A configuration that fits: slots taken away at random until it does."""
        slots = [self.rng.randint(curve.slots[0], curve.slots[-1]) for curve in self._curves]
        while not self.fits(tuple(slots)):
            layer = self.rng.randrange(len(slots))
            slots[layer] = max(self._curves[layer].slots[0], slots[layer] - 1)
        return tuple(slots)

    def mutated(self, slots: Slots) -> Slots:
        layer = self.rng.randrange(len(slots))
        curve = self._curves[layer]
        return (*slots[:layer], self.rng.randint(curve.slots[0], curve.slots[-1]), *slots[layer + 1 :])

    def crossed(self, one: Slots, other: Slots) -> Slots:
        if self.rng.random() < 0.5:
            return tuple((a + b) // 2 for a, b in zip(one, other, strict=True))
        return tuple(self.rng.choice(pair) for pair in zip(one, other, strict=True))
