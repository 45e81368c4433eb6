"""Which training runs a comparison is made of: models of several shapes, each at its best learning rate, over several
seeds; from the dense model on, or from a pruned one that has been trained for a while. Holds no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from expertd_engine.refactor.dense import Dense
from expertd_engine.refactor.pipeline import Job
from expertd_engine.refactor.router import PregatingRouter, RouterShape
from expertd_engine.refactor.shape import Routing, Shape, pruned_shape
from expertd_engine.refactor.training import Recipe

_SWEEP_SEED, _FINAL_SEED = 10, 20
"""Of runs that go on from others, whose texts they would otherwise see again in the same order."""
_LABELLED = 0.7


@dataclass(frozen=True, slots=True)
class Contest:
    """`run` is what the names of its jobs begin with. Each of `sides` tries all `rates` for as long as `short`, and
    runs as `final` with the best of them for every seed; without rates at `final`'s own. `begin`: the jobs `BEGIN-SEED`
    are what they go on from."""

    run: str
    sides: Mapping[str, Shape]
    short: Recipe
    final: Recipe
    rates: Sequence[float]
    seeds: Sequence[int]
    teacher: str | None = None
    begin: str | None = None

    def jobs(self) -> list[Job]:
        """In an order in which each finds what it needs."""
        return [job for name in self.sides for job in (*self._sweep(name), *self._finals(name))]

    def final_name(self, side: str, seed: int) -> str:
        return f"{self.run}final-{side}-{seed}"

    def _sweep(self, side: str) -> list[Job]:
        begin = self._begin(self.seeds[0])
        return [
            Job(f"{self.run}sweep-{side}-{rate:g}", self.sides[side], recipe, self.teacher, begin=begin)
            for rate in self.rates
            for recipe in (replace(self.short, learning_rate=rate),)
        ]

    def _finals(self, side: str) -> list[Job]:
        swept = tuple(job.name for job in self._sweep(side))
        return [
            Job(self.final_name(side, seed), self.sides[side], recipe, self.teacher, swept, self._begin(seed))
            for seed in self.seeds
            for recipe in (replace(self.final, seed=self.final.seed + seed),)
        ]

    def _begin(self, seed: int) -> str | None:
        return None if self.begin is None else f"{self.begin}-{seed}"


def branched(contest: Contest, pruned: Shape, first: Recipe) -> tuple[list[Job], Contest]:
    """The runs of `first` that make the pruned model once a seed, which are kept; and the contest that goes on from
    these, where experts of one index begin as copies of the pruned FFNs (`upcycle`).

    Such experts hold the same neurons, whose overlap with what a text activates tells none from the others: texts'
    domains alone teach the router, and stand in for it until experts differ.
    """
    first, short, final = (
        replace(one, overlap_share=0.0, labelled=_LABELLED) for one in (first, contest.short, contest.final)
    )
    base = f"{contest.run}base"
    bases = [
        Job(f"{base}-{seed}", pruned, replace(first, end_share=1.0, seed=seed), contest.teacher, keep=True)
        for seed in contest.seeds
    ]
    short, final = replace(short, seed=_SWEEP_SEED), replace(final, seed=_FINAL_SEED)
    return bases, replace(contest, short=short, final=final, begin=base)


def baseline_of(shape: Shape, dense: Dense) -> Shape:
    """The pruned model of as many active bytes as `shape` with its routers."""
    layers = len(dense.layers)
    if shape.routing == Routing.LAYERS:
        size = layers * shape.experts * dense.hidden_size
    else:
        heads = layers if shape.routing == Routing.HEADS else 1
        router = PregatingRouter(RouterShape.beside(dense.hidden_size, heads * shape.experts), 0)
        size = sum(one.numel() for one in router.parameters())
    return pruned_shape(shape.active, size, layers, dense.hidden_size)
