"""Lets through what a predictor foresees only where it has been right often enough. Pure.

A wrong prefetch costs link time and a slot, and most of what a predictor names is resident anyhow: how often it is
right says little about how often it is right on an *absent* expert, which is all that a prefetch is for. So that is
what is counted, whether or not a prefetch was made: there is nothing to explore.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import Exactness, Lookahead
from expertd_engine.experts.payoff import PayOff
from expertd_engine.experts.waste import MIN_PRECISION, WasteLimit

_PRIOR = 4.0
"""Made-up outcomes, half of them true, that a class begins with: a few real ones must speak before it is followed."""
_MEMORY = 1024.0
"""Outcomes after which a class's counts are halved: predictors and topics change."""
_AGE_CLASSES = 8

_LEAST_APPROVED = 32
"""Hints of one layer and lead that must have come out before that layer and lead may be switched off."""

_Class = tuple[int, int, int]
"""Layers ahead when the use was first named of the absent expert, layers ahead now, and how long ago it was used last;
of a source that says how sure it is, its trust as a negative number, layers ahead, and 0."""


@dataclass(slots=True)
class Record:
    """How hints of one class on absent experts came out."""

    true: float = _PRIOR / 2
    all: float = _PRIOR

    @property
    def precision(self) -> float:
        return self.true / self.all

    @property
    def sure_precision(self) -> float:
        """Two standard errors below: of many classes with few outcomes some are lucky, and those would be followed."""
        precision = self.precision
        return precision - 2 * math.sqrt(precision * (1 - precision) / self.all)

    def add(self, came_true: bool) -> None:
        self.true += came_true
        self.all += 1
        if self.all > _MEMORY:
            self.true, self.all = self.true / 2, self.all / 2


@dataclass(slots=True)
class Track:
    """What came of the hints for one layer at one lead, on absent experts. Counts since start, but for the last two."""

    named: int = 0
    true: int = 0
    followed: int = 0
    """Let through."""
    followed_true: int = 0
    late: int = 0
    """Followed and true, and still on its way when it was needed."""
    in_vain: int = 0
    """Followed and not true, though it was read or being read."""
    approved: float = 0.0
    approved_true: float = 0.0
    """Hints of classes that are followed, let through or not; halved from time to time."""

    @property
    def is_off(self) -> bool:
        """Whether this layer is not worth following at this lead, whatever the class."""
        return self.approved >= _LEAST_APPROVED and self.approved_true < MIN_PRECISION * self.approved

    def approve(self, came_true: bool) -> None:
        self.approved += 1
        self.approved_true += came_true
        if self.approved > _MEMORY:
            self.approved, self.approved_true = self.approved / 2, self.approved_true / 2


@dataclass(frozen=True, slots=True)
class _Judged:
    """A hint on an absent expert, until its layer has routed."""

    kind: _Class
    lead: int
    approved: bool
    followed: bool


class Governor:
    """A `Lookahead` around a predicting one, which names a use again at every layer for as long as it believes in it.
    Steps for which predictions do not pay do without: they ask neither.

    `absent_for(expert)` is None for an expert that is resident or on its way, else the lookups since its last use.
    `lookups_per_token` is MoE layers × top-k; layers and experts give positions their meaning (`experts.events`).
    """

    exactness: Exactness = "predicted"

    def __init__(
        self,
        inner: Lookahead,
        absent_for: Callable[[ExpertId], int | None],
        num_layers: int,
        num_experts: int,
        lookups_per_token: int,
        on_its_way: Callable[[ExpertId], bool] = lambda _: False,
        reads_ahead: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        """`on_its_way`: whether a load of the expert has not ended, for accounts alone. `reads_ahead`: prefetches that
        were read and have ended, since start, and how many of them were wasted.
        """
        self.tracks: dict[tuple[int, int], Track] = {}
        """By foreseen layer and lead; for status and metrics."""
        self.payoff = PayOff(in_doubt=False)
        """Whether a step is to ask."""
        self.records: dict[_Class, Record] = {}
        """For status and metrics."""
        self.waste = WasteLimit()
        self._inner = inner
        self._absent_for = absent_for
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._lookups_per_token = lookups_per_token
        self._on_its_way = on_its_way
        self._reads_ahead = reads_ahead
        self._step = 0
        """The last that asked."""
        self._first_lead: dict[int, dict[int, int]] = {}
        """Layers ahead when a use of an absent expert was first named: by layer's beginning, then position."""
        self._judged: dict[int, dict[int, dict[_Class, _Judged]]] = {}
        """Hints on experts that were absent then: by layer's beginning, then position, once for each class."""

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        self.waste.tell(step - self._step, *self._reads_ahead())
        self._step = step
        return self._let_through(step * self._num_layers - 1, self._inner.begin_step(step, token_ids))

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        now = step * self._num_layers + layer
        self._settle(now * self._num_experts, layer, experts)
        return self._let_through(now, self._inner.routed(step, layer, experts))

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return self._inner.next_use(expert, after)

    def _settle(self, begin: int, layer: int, experts: Sequence[int]) -> None:
        """The layer that begins at position `begin` has routed: what was said of it came true or did not."""
        chosen = {begin + expert for expert in experts}
        for position, judged in self._judged.pop(begin, {}).items():
            for one in judged.values():
                if (record := self.records.get(one.kind)) is None:
                    record = self.records[one.kind] = Record()
                record.add(position in chosen)
                self._account(one, ExpertId(layer, position - begin), position in chosen)
        for told in (self._judged, self._first_lead):
            for old in [first for first in told if first <= begin]:
                del told[old]

    def _account(self, one: _Judged, expert: ExpertId, came_true: bool) -> None:
        track = self.tracks.setdefault((expert.layer, one.lead), Track())
        track.named += 1
        track.true += came_true
        if one.approved:
            track.approve(came_true)
        if one.followed:
            track.followed += 1
            track.followed_true += came_true
            track.late += came_true and self._on_its_way(expert)
            track.in_vain += not came_true and self._absent_for(expert) is None

    def _let_through(self, now: int, hints: Iterable[Hint]) -> list[Hint]:
        """`now` counts layers since the first step's first. What is resident is only spared: that costs nothing."""
        aged = ((hint, self._absent_for(hint.expert)) for hint in hints)
        return [hint for hint, age in aged if age is None or self._is_worth_it(now, hint, age)]

    def _is_worth_it(self, now: int, hint: Hint, age: int) -> bool:
        layer, at = divmod(hint.needed_at, self._num_experts)
        lead, begin = layer - now, hint.needed_at - at
        first = self._first_lead.setdefault(begin, {}).setdefault(hint.needed_at, lead)
        kind = (first, lead, min(_AGE_CLASSES - 1, (age // self._lookups_per_token).bit_length()))
        if hint.trust >= 0:
            kind = (-1 - hint.trust, lead, 0)
        record, track = self.records.get(kind), self.tracks.get((hint.expert.layer, lead))
        approved = record is not None and record.sure_precision >= self.waste.least_precision
        followed = approved and not (track is not None and track.is_off)
        judged = self._judged.setdefault(begin, {}).setdefault(hint.needed_at, {})
        if kind not in judged:
            judged[kind] = _Judged(kind, lead, approved, followed)
        return followed
