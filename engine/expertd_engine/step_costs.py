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

from expertd_engine.bench.routing import Routing, make_routing, shape_of
from expertd_engine.bench.text_decoder import WARM, Decoder, Timed
from expertd_engine.calibration import Window
from expertd_engine.config import Config
from expertd_engine.errors import BudgetError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.planning.costs import Step, fit_costs
from expertd_engine.planning.replay import Routes

STREAMS = 4
"""Timed with every expert there; where they go, misses are foretold from."""
LOW_SHARES = (0.5, 0.35, 0.2)
"""Of all expert bytes: budgets at which the cost of missing experts is measured."""
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


def measure_steps(
    store: ExpertStore, config: Config, prompts: Sequence[Window], reads_s: Sequence[float], tokens: int
) -> StepCosts:
    """Time `tokens` of each stream. Raises what starting an engine raises."""
    watched = _Routes(len(store.index.layers))
    step_s, steps = _timed(store, config, prompts, tokens, None, watched)
    drifting = _timed(store, config, prompts, tokens, make_routing(DRIFTING, shape_of(store.index)), None)[1]
    leave_s, overlap = fit_costs([*steps, *drifting], reads_s)
    return StepCosts(step_s, leave_s, overlap, watched.tokens, len(watched.tokens) // STREAMS)


def _timed(
    store: ExpertStore,
    config: Config,
    prompts: Sequence[Window],
    tokens: int,
    routing: Routing | None,
    watched: _Routes | None,
) -> tuple[float, list[Step]]:
    """Seconds of a step that misses nothing, and the steps at low budgets."""
    decoder, full = Decoder(store, config, prompts, routing), Timed("100%")
    try:
        decoder.refill()
        if watched is not None:
            decoder.onlooker(watched)
        for _ in range(STREAMS):
            decoder.window(["exact"], tokens, full)
        if watched is not None:
            watched.ends = True
        step_s = fmean(full.means_s)
        return step_s, [step for share in LOW_SHARES for step in _at(decoder, share, step_s, tokens)]
    finally:
        decoder.close()


def _at(decoder: Decoder, share: float, step_s: float, tokens: int) -> Iterator[Step]:
    """Steps in that share of all expert bytes; none where so little is no budget."""
    try:
        decoder.set_budget(int(share * decoder.expert_bytes))
    except BudgetError:
        return
    low = Timed(f"{share:.0%}")
    decoder.window(["exact"], tokens, low)
    for seconds, missed in zip(low.gaps_s, low.missed, strict=True):
        yield Step(seconds - step_s, by_count(missed))


def by_count(missed: Sequence[int]) -> list[float]:
    """As `MissCurve.missing`, of a step whose layers missed so many experts each."""
    layers = Counter(missed)
    return [float(layers[n]) for n in range(1, max(missed, default=0) + 1)]
