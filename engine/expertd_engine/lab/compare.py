"""Replays a trace through every policy at several budgets, and says which of those that can be served does best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from expertd_engine.console import Progress, silent
from expertd_engine.experts.policy import HALF_LIFE_TOKENS
from expertd_engine.lab.events import Events, events_of
from expertd_engine.lab.predictor_file import Predictor
from expertd_engine.lab.rankings import (
    AdaptiveRanking,
    ClairvoyantRanking,
    ForeseenRanking,
    LeastStaleRanking,
    LFURanking,
    LRURanking,
    NamedRanking,
    Ranking,
    ScoredRanking,
)
from expertd_engine.lab.recommendation import Recommendation
from expertd_engine.lab.replay import Met, replay
from expertd_engine.lab.scores import named_by, scores_of
from expertd_engine.lab.trace import Trace
from expertd_engine.model.gates import Gate

SLOW_HALF_LIFE = 24.0
"""Tokens; where popularity outweighs recency."""
CLEARLY = 0.001
"""Hit rate by which a policy must do better than a simpler one to be recommended instead."""

Served = tuple[Literal["lru", "lfu", "next-use", "predicted"], float | None, Literal["none", "next-gate", "learned"]]

SERVED: Mapping[str, Served] = {
    "lru": ("lru", HALF_LIFE_TOKENS, "none"),
    "adaptive frequency": ("next-use", None, "none"),
    "frequency": ("next-use", HALF_LIFE_TOKENS, "none"),
    "slow frequency": ("next-use", SLOW_HALF_LIFE, "none"),
    "predicted": ("predicted", SLOW_HALF_LIFE, "learned"),
}
"""Rankings that can be served, simplest first, as `Recommendation` has them: policy, half-life, predictor."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one trace."""

    lookups: int
    tokens: int
    met: Mapping[int, Mapping[str, Met]]
    """By slots, then policy."""

    def closed(self, slots: int, policy: str) -> float | None:
        """Share of the gap between LRU and the clairvoyant bound that a policy closes; None where there is no gap."""
        met = self.met[slots]
        low, high = met["lru"].hit_rate, met["clairvoyant"].hit_rate
        return (met[policy].hit_rate - low) / (high - low) if high > low else None

    def best(self) -> str:
        """The name of the served ranking that hits most over all budgets."""
        means = {
            name: sum(met[name].hit_rate for met in self.met.values()) / len(self.met)
            for name in SERVED
            if all(name in met for met in self.met.values())
        }
        chosen = "lru"
        for name, mean in means.items():
            chosen = name if mean > means[chosen] + CLEARLY else chosen
        return chosen


def rankings(
    trace: Trace, events: Events, predictor: Predictor | None, gates: Sequence[Gate] | None
) -> dict[str, Callable[[int], Ranking]]:
    """By name, fresh ones for a cache of so many slots. Predictors are asked where the trace has hidden states."""
    found: dict[str, Callable[[int], Ranking]] = {
        "lru": lambda _: LRURanking(events),
        "least stale": lambda _: LeastStaleRanking(events),
        "adaptive frequency": lambda slots: AdaptiveRanking(events, slots),
        "frequency": lambda _: LFURanking(events),
        "slow frequency": lambda _: LFURanking(events, SLOW_HALF_LIFE),
        "4 layers known": lambda _: ForeseenRanking(events, 4, SLOW_HALF_LIFE),
        "2 tokens known": lambda _: ForeseenRanking(events, 2 * events.layers, SLOW_HALF_LIFE),
        "clairvoyant": lambda _: ClairvoyantRanking(events),
    }
    if predictor is not None and trace.hidden is not None:
        scores = scores_of(trace, events, predictor)
        found["predicted"] = lambda _: ScoredRanking(events, scores)
    if gates is not None and trace.hidden is not None:
        named = named_by(trace, gates)
        found["4 layers by next gate"] = lambda _: NamedRanking(events, named, SLOW_HALF_LIFE)
    return found


def compare(
    trace: Trace,
    slots: Sequence[int],
    predictor: Predictor | None = None,
    gates: Sequence[Gate] | None = None,
    *,
    warm: float = 0.1,
    progress: Progress = silent,
) -> Comparison:
    """The first `warm` of all events fill the cache and are not counted. Raises ValueError for too few slots."""
    events = events_of(trace)
    made, count = rankings(trace, events, predictor, gates), len(events.bounds) - 1
    met: dict[int, dict[str, Met]] = {}
    for i, one in enumerate(slots):
        met[one] = {}
        for j, (name, make) in enumerate(made.items()):
            progress("replay", (i + j / len(made)) / len(slots))
            met[one][name] = replay(events, one, make(one), round(warm * count))
    return Comparison(len(events.experts), len(trace), met)


def recommend(comparison: Comparison, store_id: str) -> Recommendation:
    """What to serve with, and by what evidence."""
    policy, half_life, predictor = SERVED[comparison.best()]
    rates = {str(slots): {name: met.hit_rate for name, met in one.items()} for slots, one in comparison.met.items()}
    return Recommendation(store_id, policy, half_life, predictor, rates, comparison.lookups)
