from __future__ import annotations

from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import EveryExpert, LayerScan, NoLookahead, rows_that_use


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


def test_a_step_of_many_rows_reads_its_layers_in_order() -> None:
    scan = LayerScan(NoLookahead(), num_layers=2, num_experts=8, top_k=2)
    many = [0] * scan.min_rows
    assert list(scan.begin_step(3, many)) == [Hint(ExpertId(0, e), 3 * 16 + e) for e in range(4)]
    assert list(scan.routed(3, 0, [1, 5])) == [Hint(ExpertId(1, e), 3 * 16 + 8 + e) for e in range(4)]
    assert not list(scan.routed(3, 1, [1, 5]))
    assert scan.next_use(ExpertId(1, 0), 0) is None and scan.exactness == "none"


def test_a_step_of_few_rows_is_the_inner_sources() -> None:
    inner = EveryExpert(num_layers=2, num_experts=8, window=3)
    scan = LayerScan(inner, num_layers=2, num_experts=8, top_k=2)
    few = [0] * (scan.min_rows - 1)
    assert list(scan.begin_step(1, few)) == list(inner.begin_step(1, few))
    assert list(scan.routed(1, 0, [2])) == list(inner.routed(1, 0, [2]))
    assert scan.next_use(ExpertId(1, 0), 5) == inner.next_use(ExpertId(1, 0), 5)
    assert scan.exactness == "exact"


def test_rows_that_use_most_experts() -> None:
    assert rows_that_use(0.9, 8, 8) == 1
    for experts, top_k in ((64, 8), (128, 8), (8, 2)):
        rows = rows_that_use(0.9, experts, top_k)
        assert (1 - top_k / experts) ** rows <= 0.1 < (1 - top_k / experts) ** (rows - 1)
