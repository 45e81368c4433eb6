"""Who gives way, over all experts at once: the shipped policies as arrays, the bound, and candidates. numpy alone.

Lowest rank first, as in `experts.policy`, whose names and arithmetic the shipped ones share.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.half_life import HalfLives
from expertd_engine.experts.policy import HALF_LIFE_TOKENS
from expertd_engine.lab.events import NEVER, Events
from expertd_engine.lab.trace import Ids

Floats = NDArray[np.float64]


class Ranking(Protocol):
    """`ranks` of all experts, flat; `changed` those whose rank the last use changed beside the used ones' own."""

    ranks: Floats
    changed: Ids | None

    def used(self, number: int, experts: Ids, at: Ids, offset: int | Ids) -> None:
        """Decoding tokens use `experts` in event `number`, as its lookups from `offset` on (or those); `at` counts
        lookups since the beginning."""
        ...


class LRURanking:
    """Least recently used first."""

    changed: Ids | None = None

    def __init__(self, events: Events) -> None:
        self.ranks: Floats = np.full(events.total, -np.inf)

    def used(self, number: int, experts: Ids, at: Ids, offset: int | Ids) -> None:
        self.ranks[experts] = at


class LFURanking:
    """Aged frequency, as `policy.LFU`; of `half_life` tokens."""

    changed: Ids | None = None

    def __init__(self, events: Events, half_life: float = HALF_LIFE_TOKENS) -> None:
        self.ranks: Floats = np.full(events.total, -np.inf)
        self._half_life = max(1, round(half_life * events.lookups_per_token))

    def used(self, number: int, experts: Ids, at: Ids, offset: int | Ids) -> None:
        # As policy.LFU: one more use at `now`; the weight is -inf where there is none yet.
        self.ranks[experts] = np.logaddexp2(self.ranks[experts], at / self._half_life)


class AdaptiveRanking(LFURanking):
    """Aged frequency as `policy.AdaptiveNextUse` has it, in a cache of `slots`."""

    def __init__(self, events: Events, slots: int) -> None:
        counts = [events.width] * events.layers
        self._half_lives = HalfLives(counts, events.lookups_per_token)
        self._half_lives.slots = slots
        super().__init__(events)
        self._layers, self._width = events.layers, events.width
        self._sampled = np.zeros(events.total, bool)
        self._sampled[[layer * events.width + expert for layer, expert in self._half_lives.sampled]] = True
        self._everyone = np.arange(events.total)

    def used(self, number: int, experts: Ids, at: Ids, offset: int | Ids) -> None:
        self.changed = None
        if number % self._layers == 0 and len(at) and self._half_lives.judge(lookups := int(at[0]) - 1):
            before, self._half_life = self._half_life, self._half_lives.current
            self.ranks += lookups / self._half_life - lookups / before
            self.changed = self._everyone
        super().used(number, experts, at, offset)
        for i in np.flatnonzero(self._sampled[experts]):
            self._half_lives.use(divmod(int(experts[i]), self._width), int(at[i]))


class ClairvoyantRanking:
    """Belady's bound: what is needed last goes first. Nothing that loads on demand can miss less."""

    changed: Ids | None = None

    def __init__(self, events: Events) -> None:
        self.ranks: Floats = np.full(events.total, -np.inf)
        self._next = events.next_uses()
        self._bounds = events.bounds

    def used(self, number: int, experts: Ids, at: Ids, offset: int | Ids) -> None:
        self.ranks[experts] = -self._next[_lookups(self._bounds[number], at, offset)].astype(np.float64)


class LeastStaleRanking:
    """Not used for a whole token first, then what the running token used already, then the rest: a published rule for
    caches below one token's experts, whose layers recur in a fixed order."""

    def __init__(self, events: Events) -> None:
        self.ranks: Floats = np.full(events.total, -np.inf)
        self._layers, self._width = events.layers, events.width
        self._used_in = np.full(events.total, -(10**9), np.int64)
        self.changed: Ids | None = None

    def used(self, number: int, experts: Ids, at: Ids, offset: int | Ids) -> None:
        """What was used one token ago and whose layer is still to come is fresh; its rank is set at its use and falls
        when its layer has passed without it."""
        layer = number % self._layers
        of_layer = np.arange(layer * self._width, (layer + 1) * self._width)
        self._used_in[experts] = number
        stale = of_layer[self._used_in[of_layer] < number]
        self.ranks[stale] = self._used_in[stale] - _STALE
        self.ranks[experts] = number
        self.changed = stale


_STALE = 2.0**32


class ForeseenRanking:
    """`policy.NextUse` where the next `leads` events are known exactly, as from a router that runs ahead."""

    def __init__(self, events: Events, leads: int, half_life: float = HALF_LIFE_TOKENS) -> None:
        self._history = LFURanking(events, half_life)
        self._next, self._events, self._leads = events.next_uses(), events, leads
        self.ranks: Floats = np.full(events.total, -np.inf)
        self.changed: Ids | None = None

    def used(self, number: int, experts: Ids, at: Ids, offset: int | Ids) -> None:
        self._history.used(number, experts, at, offset)
        bounds, ahead = self._events.bounds, number + self._leads
        following = self._next[_lookups(bounds[number], at, offset)]
        self.ranks[experts] = np.where(following <= ahead, _LAST - following, self._history.ranks[experts])
        self.changed = None
        if number < ahead < len(bounds) - 1:
            seen = self._events.experts[bounds[ahead] : bounds[ahead + 1]]
            self.changed = seen[self.ranks[seen] < _KNOWN]
            self.ranks[self.changed] = _LAST - ahead


_LAST = float(NEVER)
_KNOWN = _LAST / 2
"""From here on ranks are of known next uses, the soonest highest; below, of history."""


def _lookups(begin: int, at: Ids, offset: int | Ids) -> slice | Ids:
    """Of an event that begins with lookup `begin`, those that are told of."""
    return begin + offset if isinstance(offset, np.ndarray) else slice(begin + offset, begin + offset + len(at))


class NamedRanking:
    """`policy.NextUse` where a predictor names what the next layers will use; what it names wrongly is believed until
    its layer has passed.

    `named` `[rows, layers, leads, k]` are the experts that each token's state in each layer names, by lead.
    """

    def __init__(self, events: Events, named: NDArray[np.int16], half_life: float = HALF_LIFE_TOKENS) -> None:
        self._history = LFURanking(events, half_life)
        self._known = np.full(events.total, NEVER)
        """Event of the next use that is believed in."""
        self._events, self._named = events, named
        self._rows = np.append(np.unique(events.tokens), len(named))
        """Where each step begins."""
        self.ranks: Floats = np.full(events.total, -np.inf)
        self.changed: Ids | None = None

    def used(self, number: int, experts: Ids, at: Ids, offset: int | Ids) -> None:
        self._history.used(number, experts, at, offset)
        layers, width = self._events.layers, self._events.width
        step, layer = divmod(number, layers)
        passed = np.arange(layer * width, (layer + 1) * width)
        self._known[passed[self._known[passed] <= number]] = NEVER
        named = self._named[self._rows[step] : self._rows[step + 1], layer]
        for lead in range(named.shape[1], 0, -1):  # the soonest stands
            self._known[(layer + lead) % layers * width + named[:, lead - 1].ravel()] = number + lead
        leads = (layer + np.arange(named.shape[1] + 1)) % layers
        self.changed = (leads[:, None] * width + np.arange(width)).ravel()
        known = self._known[self.changed]
        self.ranks[self.changed] = np.where(known == NEVER, self._history.ranks[self.changed], float(NEVER) - known)


class ScoredRanking:
    """By scores that a predictor gave each expert of a layer once that layer had routed: lowest first.

    `scores[i]` `[width]` are those after event i.
    """

    def __init__(self, events: Events, scores: NDArray[np.float32]) -> None:
        self.ranks: Floats = np.full(events.total, -np.inf)
        self._scores, self._layers = scores, events.layers
        self._of_layer = np.arange(events.total).reshape(events.layers, events.width)
        self.changed: Ids | None = None

    def used(self, number: int, experts: Ids, at: Ids, offset: int | Ids) -> None:
        self.changed = self._of_layer[number % self._layers]
        self.ranks[self.changed] = self._scores[number]
