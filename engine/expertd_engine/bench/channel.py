"""Foresight with a stated recall: what is predicted of a token's routes at each lead, given the routes. numpy alone.

At lead d (layers ahead) each chosen expert of a token is predicted right with probability `recalls[d - 1]`; a wrong
prediction names an expert that the token does not choose in that layer. One draw decides for all leads: a prediction
that is right far ahead stays right, as when a predictor sees more the nearer it comes. The noise is drawn without
looking at the routes, and a prediction for a layer depends on that layer's routes alone: nothing beyond it can leak.

What a pre-gating router knows is no prediction: all layers of a token, once it is sampled, and nothing of the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expertd_engine.bench.routing import Ids
from expertd_engine.errors import UsageError

DEFAULT_RECALLS = (0.90, 0.85, 0.80, 0.75)
PREDICTORS = ("next-gate", "learned")
"""The engine's own: these see hidden states, and so foresee the model's own routes alone."""


@dataclass(frozen=True, slots=True)
class Channel:
    """`recalls[d - 1]` is the share of a token's experts that is known d layers ahead.

    `at_once`: all layers of a step are known exactly when it begins, and nothing of the step after it.
    """

    recalls: tuple[float, ...]
    at_once: bool = False

    def __post_init__(self) -> None:
        if not self.recalls or not all(0 <= recall <= 1 for recall in self.recalls):
            raise ValueError(f"recalls {self.recalls} are not allowed: give at least one, each from 0 to 1")
        if any(near < far for near, far in zip(self.recalls, self.recalls[1:], strict=False)):
            raise ValueError(f"recalls {self.recalls} are not allowed: a longer lead cannot be known better")

    @property
    def is_exact(self) -> bool:
        return min(self.recalls) == 1

    def predict(self, routes: Ids, experts: int, rng: np.random.Generator) -> Ids:
        """Predictions `[tokens, layers, leads, top_k]` of `routes` `[tokens, layers, top_k]`, each row distinct."""
        tokens, layers, top_k = routes.shape
        luck = rng.random((tokens, layers, 1, top_k), np.float32)
        others = _others(routes, experts, rng.random((tokens, layers, experts), np.float32))
        known = luck < np.array(self.recalls, np.float32)[:, None]
        return np.where(known, routes[:, :, None, :], others[:, :, None, :])


def make_channel(name: str) -> Channel | None:
    """`none` or an engine's own predictor (None), `exact` (all layers of a token once it is sampled), `exact:LEADS` (so
    many layers ahead, whichever token's), `default`, or recalls by lead such as `0.9,0.8`. Raises UsageError."""
    kind, _, detail = name.partition(":")
    if name == "none" or name in PREDICTORS:
        return None
    try:
        if kind == "exact":
            return Channel((1.0,) * int(detail)) if detail else Channel((1.0,), at_once=True)
        return Channel(DEFAULT_RECALLS if name == "default" else tuple(float(part) for part in name.split(",")))
    except ValueError as error:
        raise UsageError(
            f"hints {name!r} are not allowed: give none, next-gate, learned, exact, exact:LEADS, default, or recalls "
            f"by lead such as 0.9,0.8: {error}"
        ) from None


def _others(routes: Ids, experts: int, luck: np.ndarray[tuple[int, int, int], np.dtype[np.float32]]) -> Ids:
    """For each choice another expert that the token does not choose in that layer; distinct where there are enough.

    Where every expert is chosen there is no other: the choice itself.
    """
    top_k = routes.shape[-1]
    spare = min(top_k, experts - top_k)
    if spare == 0:
        return routes
    np.put_along_axis(luck, routes, -1.0, axis=-1)
    order = np.argpartition(luck, -spare, axis=-1)[..., -spare:]
    return np.concatenate([order, np.repeat(order[..., :1], top_k - spare, axis=-1)], axis=-1)
