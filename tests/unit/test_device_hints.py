"""Hints on a device: what is resident is not worth the host's time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expertd_engine.experts.device_hints import AbsentHints, Tried, payoff_of
from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import Exactness, NoLookahead

SLOTS = [[-1, 3, -1], [0, -1, 7]]


class Foresight:
    exactness: Exactness = "exact"

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        return [Hint(ExpertId(0, expert), expert) for expert in range(3)]

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        return [Hint(ExpertId(1, expert), 3 + expert) for expert in range(3)]

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return 42


def test_only_absent_experts_are_named() -> None:
    hints = AbsentHints(Foresight(), SLOTS.__getitem__)
    assert [hint.expert for hint in hints.begin_step(1, ())] == [ExpertId(0, 0), ExpertId(0, 2)]
    assert [hint.expert for hint in hints.routed(1, 0, (0,))] == [ExpertId(1, 1)]
    assert (hints.exactness, hints.next_use(ExpertId(1, 0), 0)) == ("exact", 42)


def test_what_comes_or_goes_is_seen_at_the_next_layer() -> None:
    slots = [list(layer) for layer in SLOTS]
    hints = AbsentHints(Foresight(), slots.__getitem__)
    slots[1] = [-1, 5, -1]
    assert [hint.expert for hint in hints.routed(1, 0, (0,))] == [ExpertId(1, 0), ExpertId(1, 2)]


def test_what_is_exact_is_tried_as_well() -> None:
    hints = Tried(Foresight())
    assert payoff_of(hints) is hints.payoff and payoff_of(NoLookahead()) is None
    assert len(list(hints.begin_step(1, ()))) == 3 and len(list(hints.routed(1, 0, (0,)))) == 3
    assert (hints.exactness, hints.next_use(ExpertId(1, 0), 0)) == ("exact", 42)
