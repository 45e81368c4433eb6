"""Routes made to measure: which experts each token chooses in each layer, by a seeded random process. numpy alone.

A token of a layer chooses the `top_k` experts of highest score, where the score of expert e at token t is

    popularity·b[e] + topic·s[e, t] + local·f[e, t] + Gumbel noise

b is drawn once and for all streams; s and f are stationary first-order processes of each stream that forget over
`topic_tokens` and `local_tokens`. So some experts are used more than others, neighbouring tokens choose alike, and what
is in use drifts. All numbers of one process live in `routing.json`, fitted by `fit_routing`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from expertd_engine.errors import UsageError
from expertd_engine.experts.store_format import StoreIndex

Ids: TypeAlias = NDArray[np.int64]
PARAMETERS = Path(__file__).with_name("routing.json")
_WARM_TOKENS = 64
_BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """What routes must fit: MoE layers, experts in each, experts a token."""

    layers: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        if not (self.layers >= 1 and 1 <= self.top_k <= self.experts):
            raise ValueError(f"no routes for {self}: need a layer, and top_k between 1 and experts")


def shape_of(index: StoreIndex) -> RoutingShape:
    """What routes for a store's model look like."""
    return RoutingShape(len(index.layers), max(layer.num_experts for layer in index.layers), index.top_k)


@dataclass(frozen=True, slots=True)
class Persistence:
    """The process's numbers. Scores are in units of the noise; tokens are those after which 1/e is left."""

    popularity: float
    topic: float
    topic_tokens: float
    local: float
    local_tokens: float


class TokenRoutes(Protocol):
    """Routes of one stream of tokens, in order."""

    def take(self, count: int) -> Ids:
        """The next `count` tokens' experts, `[count, layers, top_k]`, ascending in each row."""
        ...


class UniformRoutes:
    """Every set of `top_k` experts is as likely as any other, whatever came before."""

    def __init__(self, shape: RoutingShape, seed: int, stream: int) -> None:
        self._shape = shape
        self._rng = np.random.default_rng([seed, 1, stream])

    def take(self, count: int) -> Ids:
        shape = self._shape
        return _top(self._rng.random((count, shape.layers, shape.experts), np.float32), shape.top_k)


class PersistentRoutes:
    """The process of the module's head. Streams of one seed share the popularity of experts and nothing else."""

    def __init__(self, shape: RoutingShape, numbers: Persistence, seed: int, stream: int) -> None:
        size = (shape.layers, shape.experts)
        self._shape = shape
        self._numbers = numbers
        popularity = np.random.default_rng([seed, 2]).standard_normal(size, np.float32)
        self._popularity = np.float32(numbers.popularity) * popularity
        self._rng = np.random.default_rng([seed, 3, stream])
        self._topic = self._rng.standard_normal(size, np.float32)
        self._local = self._rng.standard_normal(size, np.float32)

    def take(self, count: int) -> Ids:
        blocks = [self._block(min(_BLOCK_TOKENS, count - done)) for done in range(0, count, _BLOCK_TOKENS)]
        return np.concatenate(blocks) if blocks else np.empty((0, self._shape.layers, self._shape.top_k), np.int64)

    def _block(self, count: int) -> Ids:
        numbers, size = self._numbers, (count, *self._topic.shape)
        scores = self._rng.random(size, np.float32)
        np.log(np.maximum(scores, np.float32(1e-20), out=scores), out=scores)
        np.negative(np.log(np.negative(scores, out=scores), out=scores), out=scores)  # Gumbel
        steps = self._rng.standard_normal((2, *size), np.float32)
        keep_topic, keep_local = (math.exp(-1 / tokens) for tokens in (numbers.topic_tokens, numbers.local_tokens))
        fresh_topic, fresh_local = (math.sqrt(1 - keep * keep) for keep in (keep_topic, keep_local))
        for t in range(count):
            self._topic = np.float32(keep_topic) * self._topic + np.float32(fresh_topic) * steps[0, t]
            self._local = np.float32(keep_local) * self._local + np.float32(fresh_local) * steps[1, t]
            scores[t] += self._popularity + np.float32(numbers.topic) * self._topic
            scores[t] += np.float32(numbers.local) * self._local
        return _top(scores, self._shape.top_k)


class RecordedRoutes:
    """A recorded trace, from `stream` parts of it on; begins anew where it ends.

    `routes` is `[tokens, layers, top_k]`.
    """

    def __init__(self, routes: Ids, stream: int, streams: int) -> None:
        self._routes = routes
        self._next = stream * len(routes) // max(1, streams)

    def take(self, count: int) -> Ids:
        rows = (self._next + np.arange(count)) % len(self._routes)
        self._next += count
        return self._routes[rows]


@dataclass(frozen=True, slots=True)
class Routing:
    """What `--routing` named: how to make the routes of a stream. `numbers` are those of a calibrated process."""

    name: str
    shape: RoutingShape
    seed: int
    numbers: Persistence | None = None
    trace: Ids | None = None

    def stream(self, stream: int, streams: int = 1) -> TokenRoutes:
        """Routes of stream number `stream` of `streams`; equal for equal arguments."""
        if self.trace is not None:
            return RecordedRoutes(self.trace, stream, streams)
        if self.numbers is None:
            return UniformRoutes(self.shape, self.seed, stream)
        return PersistentRoutes(self.shape, self.numbers, self.seed, stream)


def make_routing(name: str, shape: RoutingShape, seed: int = 0) -> Routing | None:
    """`uniform`, `calibrated:PROFILE` or `trace:FILE`; None for `model`: the model's own router chooses.

    Raises UsageError for another name, an unknown profile, or a trace that does not fit `shape`.
    """
    kind, _, detail = name.partition(":")
    if name == "model":
        return None
    if name == "uniform":
        return Routing(name, shape, seed)
    if kind == "calibrated":
        return Routing(name, shape, seed, numbers=calibrated(detail))
    if kind == "trace" and detail:
        return Routing(name, shape, seed, trace=read_trace(Path(detail), shape))
    raise UsageError(f"routing {name!r} is not known: give model, uniform, calibrated:PROFILE or trace:FILE")


def load_profiles() -> dict[str, dict[str, Any]]:
    """The committed parameter file: by profile the fitted numbers, the shape and the hit rates they were fitted to."""
    profiles: dict[str, dict[str, Any]] = json.loads(PARAMETERS.read_text(encoding="utf-8"))
    return profiles


def calibrated(profile: str) -> Persistence:
    """The fitted numbers of a profile. Raises UsageError for an unknown one."""
    profiles = load_profiles()
    if profile not in profiles:
        raise UsageError(f"routing profile {profile!r} is not known: choose from {', '.join(profiles)}")
    return persistence_of(profiles[profile]["numbers"])


def persistence_of(numbers: Mapping[str, float]) -> Persistence:
    return Persistence(**{name: float(value) for name, value in numbers.items()})


def numbers_of(persistence: Persistence) -> dict[str, float]:
    return asdict(persistence)


def read_trace(path: Path, shape: RoutingShape) -> Ids:
    """Array `routes` `[tokens, layers, top_k]` of an .npz file. Raises UsageError where it does not fit `shape`."""
    try:
        with np.load(path) as file:
            routes = np.sort(file["routes"].astype(np.int64), axis=-1)
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(
            f"trace {path} cannot be read: it must be an .npz file with an array `routes`: {error}"
        ) from None
    wanted = (shape.layers, shape.top_k)
    if routes.ndim != 3 or routes.shape[1:] != wanted or not len(routes):
        raise UsageError(f"trace {path} has routes of shape {routes.shape}; the model needs [tokens, {wanted}]")
    if routes.min() < 0 or routes.max() >= shape.experts or (np.diff(routes, axis=-1) == 0).any():
        raise UsageError(f"trace {path} must name distinct experts from 0 to {shape.experts - 1} in every row")
    return routes


def _top(scores: NDArray[np.float32], top_k: int) -> Ids:
    if top_k == scores.shape[-1]:
        return np.broadcast_to(np.arange(top_k), scores.shape).copy()
    chosen = np.argpartition(scores, -top_k, axis=-1)[..., -top_k:]
    return np.sort(chosen, axis=-1)
