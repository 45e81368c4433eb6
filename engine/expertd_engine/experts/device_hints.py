"""Hints worth the time of a host whose device runs: of what is foreseen, what is not there, while that pays. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.governor import Governor
from expertd_engine.experts.lookahead import Exactness, Lookahead
from expertd_engine.experts.payoff import PayOff


class AbsentHints:
    """A `Lookahead` around another that leaves out what is resident: nine hints in ten, each of which would be looked
    at by a governor and a ledger before the next layer has routed.
    """

    def __init__(self, inner: Lookahead, resident_slots: Callable[[int], Sequence[int]]) -> None:
        """`resident_slots(layer)[expert]` is negative for an absent expert."""
        self.exactness: Exactness = inner.exactness
        self._inner = inner
        self._resident_slots = resident_slots

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        return self._absent(self._inner.begin_step(step, token_ids))

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        return self._absent(self._inner.routed(step, layer, experts))

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return self._inner.next_use(expert, after)

    def _absent(self, hints: Iterable[Hint]) -> list[Hint]:
        slots = self._resident_slots
        return [hint for hint in hints if slots(hint.expert.layer)[hint.expert.expert] < 0]


class Tried:
    """A `Lookahead` around another that steps ask only while that pays: even what is exact takes the host time, and
    while it is busy a step may wait for it."""

    def __init__(self, inner: Lookahead) -> None:
        self.exactness: Exactness = inner.exactness
        self.payoff = PayOff()
        self._inner = inner

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        return self._inner.begin_step(step, token_ids)

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        return self._inner.routed(step, layer, experts)

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return self._inner.next_use(expert, after)


def payoff_of(lookahead: Lookahead) -> PayOff | None:
    """Who tries whether a device's foresight pays; None where there is none."""
    return lookahead.payoff if isinstance(lookahead, Governor | Tried) else None
