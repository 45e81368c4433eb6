from __future__ import annotations

from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import EveryExpert, NoLookahead


def test_without_lookahead_nothing_is_foreseen() -> None:
    nothing = NoLookahead()
    assert not list(nothing.begin_step(1, [5])) and not list(nothing.routed(1, 0, [0]))
    assert nothing.next_use(ExpertId(0, 0), 3) is None
    assert nothing.exactness == "none"


def test_every_expert_recurs_after_one_period() -> None:
    cycle = EveryExpert(num_layers=3, num_experts=4, window=5)
    for step in (0, 1, 7):
        for position in range(step * 12, step * 12 + 12):
            expert = ExpertId(*divmod(position % 12, 4))
            assert cycle.next_use(expert, position) == position + 12
            assert cycle.next_use(expert, position - 1) == position


def test_every_expert_names_the_uses_that_follow_soonest_first() -> None:
    cycle = EveryExpert(num_layers=2, num_experts=2, window=3)
    assert cycle.begin_step(1, [5]) == [
        Hint(ExpertId(0, 0), 4), Hint(ExpertId(0, 1), 5), Hint(ExpertId(1, 0), 6),
    ]  # fmt: skip
    assert next(iter(cycle.routed(1, 0, [0, 1]))) == Hint(ExpertId(1, 0), 6)
    assert list(cycle.routed(1, 1, [0, 1]))[:2] == [Hint(ExpertId(0, 0), 8), Hint(ExpertId(0, 1), 9)]
