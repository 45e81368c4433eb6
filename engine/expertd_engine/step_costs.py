"""Times decode steps of a store by budget, as a client's would be: what they cost, what they miss, and where they go.

Text is continued by sampling, in engines of its own: what a model says is routed otherwise than what it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from expertd_engine.bench.routing import Routing, RoutingShape, make_routing, shape_of
from expertd_engine.bench.text_decoder import WARM, Decoder, Timed
from expertd_engine.calibration import Window
from expertd_engine.config import Config
from expertd_engine.errors import BudgetError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.planning.costs import Step, fit_costs
from expertd_engine.planning.replay import Routes

STREAMS = 4
"""Timed with every expert there, or as many as the box has room for; where they go, misses are foretold from."""
LOW_SHARES = (0.5, 0.35, 0.2)
"""Of all expert bytes: budgets at which the cost of missing experts is measured, as far as the box has so much."""
DRIFTING = "calibrated:fine"
"""Routes that miss something in every model, whatever its own do."""
NOT_COUNTED = WARM - 1
"""Decode steps of a stream before those that are timed."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The first three as `BoxProfile` has them."""

    step_s: float
    leave_s: float
    overlap: float
    routes: Routes
    """Of the model's own text, one stream after the other."""
    stream: int
    """Tokens of each, `NOT_COUNTED` included."""


class _Routes:
    """An `Onlooker` that keeps where decoding tokens go, one a step."""

    sees_hidden = False

    def __init__(self, layers: int) -> None:
        self.tokens: list[list[Sequence[int]]] = []
        self.ends = False
        self._layers = layers

    def begin_step(self, streams: Sequence[int], decode: Sequence[bool]) -> bool:
        sees = not self.ends and len(decode) == 1 and decode[0]
        if sees:
            self.tokens.append([()] * self._layers)
        return sees

    def routed(self, layer: int, chosen: NDArray[np.int64], hidden: torch.Tensor | None) -> None:
        self.tokens[-1][layer] = sorted(chosen[0].tolist())

    def end_step(self, *, well: bool) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _Windows:
    """Of one engine, from its largest budget down."""

    first: Timed
    fits: bool
    """Every expert was there in the first."""
    low: list[Timed]

    def steps(self, still: Timed) -> Iterator[Step]:
        """Those that may have missed something, beyond this engine's own that did not, or else beyond `still`."""
        without = fmean((self.first if self.fits else still).means_s)
        for timed in self.low if self.fits else [self.first, *self.low]:
            for seconds, missed in zip(timed.gaps_s, timed.missed, strict=True):
                yield Step(seconds - without, by_count(missed))


def measure_steps(
    store: ExpertStore, config: Config, prompts: Sequence[Window], reads_s: Sequence[float], tokens: int
) -> StepCosts:
    """Time `tokens` of each stream. No budget is above what serving would plan for this box: where that does not hold
    every expert, a step that misses nothing is one whose tokens all go to the same few.

    Raises what starting an engine raises.
    """
    shape, watched = shape_of(store.index), _Routes(len(store.index.layers))
    own = _timed(store, config, prompts, tokens, None, watched)
    drifting = _timed(store, config, prompts, tokens, make_routing(DRIFTING, shape), None)
    still = (own if own.fits else _timed(store, config, prompts, tokens, _always_the_same(shape), None)).first
    leave_s, overlap = fit_costs([*own.steps(still), *drifting.steps(still)], reads_s)
    return StepCosts(fmean(still.means_s), leave_s, overlap, watched.tokens, len(watched.tokens) // STREAMS)


def _timed(
    store: ExpertStore,
    config: Config,
    prompts: Sequence[Window],
    tokens: int,
    routing: Routing | None,
    watched: _Routes | None,
) -> _Windows:
    decoder, first = Decoder(store, config, prompts, routing), Timed("planned")
    try:
        fits, room = decoder.holds_all, decoder.budget_bytes
        if fits:
            decoder.refill()
        if watched is not None:
            decoder.onlooker(watched)
        for _ in range(STREAMS):
            decoder.window(["exact"], tokens, first)
        if watched is not None:
            watched.ends = True
        budgets = (int(share * decoder.expert_bytes) for share in LOW_SHARES)
        low = [one for budget in budgets if budget <= room for one in _at(decoder, budget, tokens)]
        return _Windows(first, fits, low)
    finally:
        decoder.close()


def _at(decoder: Decoder, budget: int, tokens: int) -> Iterator[Timed]:
    """Steps in so many bytes; none where so little is no budget."""
    try:
        decoder.set_budget(budget)
    except BudgetError:
        return
    low = Timed(f"{budget} bytes")
    decoder.window(["exact"], tokens, low)
    yield low


def _always_the_same(shape: RoutingShape) -> Routing:
    routes = np.tile(np.arange(shape.top_k), (2, shape.layers, 1))
    return Routing("always the same", shape, 0, trace=routes)


def by_count(missed: Sequence[int]) -> list[float]:
    """As `MissCurve.missing`, of a step whose layers missed so many experts each."""
    layers = Counter(missed)
    return [float(layers[n]) for n in range(1, max(missed, default=0) + 1)]
