"""Fits the numbers of the routing process to published hit rates of an LRU cache, and prints how well they are met.

`expertd bench routing --fit` writes `routing.json` anew, `expertd bench routing` prints the fit of what is committed.
Everything is seeded: the same code writes the same file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from expertd_engine.bench.replay import lru_lookups
from expertd_engine.bench.routing import (
    PARAMETERS,
    Persistence,
    PersistentRoutes,
    RoutingShape,
    load_profiles,
    numbers_of,
    persistence_of,
)

FIT_TOKENS, FIT_WARM_TOKENS = 600, 200
CHECK_TOKENS, CHECK_WARM_TOKENS = 3000, 1000


@dataclass(frozen=True, slots=True)
class Target:
    """Published hit rates at shares of all experts, each as the range that counts as met."""

    shape: RoutingShape
    source: str
    hits: dict[float, tuple[float, float]]


TARGETS = {
    "qwen3-30b": Target(
        RoutingShape(48, 128, 8),
        "Qwen3-30B-A3B, LRU row of SeqMoE (arXiv 2609.12978)",
        {0.15: (0.600, 0.600), 0.25: (0.742, 0.742), 0.35: (0.845, 0.845), 0.40: (0.864, 0.864), 0.45: (0.885, 0.885)},
    ),
    "fine": Target(
        RoutingShape(16, 64, 8),
        "LRU bands reported for fine-grained models",
        {0.25: (0.76, 0.87), 0.50: (0.93, 0.96)},
    ),
}
_START = Persistence(popularity=0.5, topic=2.0, topic_tokens=150.0, local=1.0, local_tokens=8.0)
_ROUNDS = 120


def hit_rates(
    shape: RoutingShape, numbers: Persistence, shares: Sequence[float], *, tokens: int, warm: int, seed: int
) -> list[float]:
    """Hit ratio of an LRU cache of each share of all experts over one stream, the first `warm` tokens not counted."""
    routes = PersistentRoutes(shape, numbers, seed, 0).take(tokens).tolist()
    steps = [(token >= warm, layers) for token, layers in enumerate(routes)]
    slots = [max(1, int(share * shape.layers * shape.experts)) for share in shares]
    return [lru_lookups(steps, count).hit_ratio for count in slots]


def fit(target: Target) -> Persistence:
    """Random descent in the logarithms of the numbers, from a fixed start, with steps that shrink."""
    rng = np.random.default_rng(7)
    best, best_error = _START, _error(target, _START)
    for turn in range(_ROUNDS):
        spread = 0.35 * 0.97**turn
        tried = persistence_of(
            {name: value * float(np.exp(spread * rng.standard_normal())) for name, value in numbers_of(best).items()}
        )
        tried = replace(tried, topic_tokens=min(tried.topic_tokens, 1000.0), local_tokens=max(tried.local_tokens, 1.0))
        error = _error(target, tried)
        if error < best_error:
            best, best_error = tried, error
    return persistence_of({name: float(f"{value:.4g}") for name, value in numbers_of(best).items()})


def _error(target: Target, numbers: Persistence) -> float:
    found = hit_rates(target.shape, numbers, list(target.hits), tokens=FIT_TOKENS, warm=FIT_WARM_TOKENS, seed=0)
    middles = [(low + high) / 2 for low, high in target.hits.values()]
    return sum((one - other) ** 2 for one, other in zip(found, middles, strict=True))


def describe() -> str:
    """The committed fit as a table: published rates beside those of a stream that the fit has not seen."""
    lines = [
        f"LRU over all slots of the model, one stream, one lookup for each (expert, layer) of a token; "
        f"{CHECK_TOKENS} tokens of a stream the fit has not seen, the first {CHECK_WARM_TOKENS} not counted."
    ]
    for profile, entry in load_profiles().items():
        target = TARGETS[profile]
        numbers = persistence_of(entry["numbers"])
        found = hit_rates(target.shape, numbers, list(target.hits), tokens=CHECK_TOKENS, warm=CHECK_WARM_TOKENS, seed=1)
        shape = target.shape
        lines.append(
            f"\ncalibrated:{profile}: {target.source}; {shape.layers} layers × {shape.experts}, top-{shape.top_k}"
        )
        lines.append("  " + ", ".join(f"{name} {value:g}" for name, value in numbers_of(numbers).items()))
        lines.append("  share   published   process")
        for (share, (low, high)), rate in zip(target.hits.items(), found, strict=True):
            published = f"{low:.1%}" if low == high else f"{low:.0%}–{high:.0%}"
            lines.append(f"  {share:>5.0%} {published:>11} {rate:>9.1%}")
    return "\n".join(lines)


def refit() -> None:
    """Fit all targets and write the parameter file anew."""
    profiles = {
        profile: {"source": target.source, "numbers": numbers_of(fit(target))} for profile, target in TARGETS.items()
    }
    PARAMETERS.write_text(json.dumps(profiles, indent=2) + "\n", encoding="utf-8")
