"""The guard gives back exactly what is too much, never more than it may, and nothing while all is well."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expertd_engine.planning.guard import guarded_expert_budget

BYTES = st.integers(0, 10**12)


@given(used=BYTES, budget=BYTES, experts=BYTES, minimum=BYTES)
def test_it_gives_back_what_is_too_much(used: int, budget: int, experts: int, minimum: int) -> None:
    shrunk = guarded_expert_budget(
        used_bytes=used, memory_budget_bytes=budget, expert_budget_bytes=experts, minimum_bytes=minimum
    )
    if used <= budget or experts <= minimum:
        assert shrunk is None
    else:
        assert shrunk is not None
        assert minimum <= shrunk < experts
        assert shrunk == minimum or used - (experts - shrunk) == budget
