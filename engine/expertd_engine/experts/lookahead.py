"""What is known, or believed, of future routes. One protocol, three sources (none, exact, predicted).

Pure: positions in, positions out. The native router stays the authority; what a lookahead says only decides when
bytes move, never which expert computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from expertd_engine.experts.events import ExpertId, Hint

Exactness = Literal["none", "predicted", "exact"]


class Lookahead(Protocol):
    """A source of foreseen uses. `exactness` is reported to users; `exact` sources must never be wrong."""

    exactness: Exactness

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        """Uses foreseen from the step's tokens alone, before its first layer; soonest first."""

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        """Uses foreseen once `layer` has routed to `experts` (ascending); soonest first."""

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        """Position of the expert's next known use later than position `after`; None if unknown."""


class NoLookahead:
    """Nothing is foreseen: eviction by history alone, no prefetch."""

    exactness: Exactness = "none"

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        return ()

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        return ()

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return None


class EveryExpert:
    """Exact routes of a model whose tokens choose every expert of every layer (`top_k = E`): a fixed cycle.

    The position of (layer l, expert e) in step s is `s·L·E + l·E + e`, so each use recurs after exactly `L·E`.
    `window` is how many uses ahead are named as hints after each layer: what the transfer threads can have in flight.
    """

    exactness: Exactness = "exact"

    def __init__(self, num_layers: int, num_experts: int, window: int) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.window = window
        self.period = num_layers * num_experts

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        return self._following(step * self.period)

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        return self._following(step * self.period + (layer + 1) * self.num_experts)

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        offset = expert.layer * self.num_experts + expert.expert
        cycles = (after - offset) // self.period + 1
        return cycles * self.period + offset

    def _following(self, start: int) -> list[Hint]:
        return [
            Hint(ExpertId(*divmod(position % self.period, self.num_experts)), position)
            for position in range(start, start + self.window)
        ]


class LayerScan:
    """Around another source: a step of many rows uses nearly every expert, so its layers can be read in order.

    Applies to steps of at least `min_rows` rows. After each layer the first half of the next one's experts are hints:
    that bridges attention and router, and leaves most slots to the experts that decoding works with (law 5); the other
    half is demanded while the first computes. Hints, not knowledge: `next_use` stays the inner source's.
    """

    USED_SHARE = 0.9
    """Of a layer's experts that a step must be expected to use."""

    def __init__(self, inner: Lookahead, num_layers: int, num_experts: int, top_k: int) -> None:
        self.inner = inner
        self.exactness = inner.exactness
        self.min_rows = rows_that_use(self.USED_SHARE, num_experts, top_k)
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._top_k = top_k
        self._scanning = False

    def alone(self) -> LayerScan:
        """As this, with nothing else foreseen."""
        return LayerScan(NoLookahead(), self._num_layers, self._num_experts, self._top_k)

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        self._scanning = len(token_ids) >= self.min_rows
        hints = self.inner.begin_step(step, token_ids)
        return self._layer(step, 0) if self._scanning else hints

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        hints = self.inner.routed(step, layer, experts)
        return self._layer(step, layer + 1) if self._scanning else hints

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return self.inner.next_use(expert, after)

    def _layer(self, step: int, layer: int) -> list[Hint]:
        if layer == self._num_layers:
            return []
        first = (step * self._num_layers + layer) * self._num_experts
        return [Hint(ExpertId(layer, e), first + e) for e in range(-(-self._num_experts // 2))]


def rows_that_use(share: float, num_experts: int, top_k: int) -> int:
    """Rows whose choices, were they independent and even, leave at most `1 - share` of a layer's experts unused."""
    if top_k >= num_experts:
        return 1
    return math.ceil(math.log(1 - share) / math.log(1 - top_k / num_experts))
