"""The guard gives back exactly what is too much, never more than it may, and takes again only where there is room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expertd_engine.planning.guard import ExpertBudget, guarded_expert_budget

BYTES = st.integers(0, 10**12)


@st.composite
def budgets(draw: st.DrawFn) -> ExpertBudget:
    minimum, now, planned = sorted(draw(st.tuples(BYTES, BYTES, BYTES)))
    return ExpertBudget(now, draw(st.integers(0, now)), minimum, planned)


@given(used=BYTES, budget=BYTES, experts=budgets())
def test_above_the_budget_it_gives_back_what_is_too_much(used: int, budget: int, experts: ExpertBudget) -> None:
    after = guarded_expert_budget(used, budget, experts)
    assert experts.minimum <= after <= experts.planned
    if used > budget:
        assert after == max(experts.minimum, experts.now - (used - budget))


@given(used=BYTES, budget=BYTES, experts=budgets())
def test_what_it_takes_again_fits_once_every_slot_is_filled(used: int, budget: int, experts: ExpertBudget) -> None:
    after = guarded_expert_budget(used, budget, experts)
    if after > experts.now:
        assert used + (after - experts.resident) <= budget


def test_a_transient_is_not_for_ever() -> None:
    experts = ExpertBudget(now=60, resident=60, minimum=10, planned=100)
    for _ in range(20):
        now = guarded_expert_budget(100 + experts.resident, 300, experts)
        experts = ExpertBudget(now, now, 10, 100)
    assert experts.now == 100
