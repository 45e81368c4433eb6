"""Dividing a memory budget that changes while sequences run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_engine.config import Size
from expertd_engine.errors import BudgetError
from expertd_engine.planning.live import divide
from expertd_engine.planning.startup_plan import GROWTH_BYTES, Asked, Measured, plan_memory

MEASURED = Measured(
    base=1000, step=100, experts_minimum=200, experts_total=5000, kv_block=10, block_tokens=16, available=10**9
)
ASKED = Asked(None, None, None, max_model_len=64, max_sequences=4)
FIXED = 1100 + GROWTH_BYTES


def test_without_live_sequences_it_is_the_plan_at_start() -> None:
    for room in (240, 1000, 5040, 5100, 9000):
        plan = plan_memory(MEASURED, replace(ASKED, memory_budget=Size(bytes=FIXED + room)))
        found = divide(MEASURED, ASKED, FIXED + room, needed_blocks=1, most_blocks=100)
        assert (found.expert_budget_bytes, found.kv_blocks) == (plan.expert_budget_bytes, plan.kv_blocks)


def test_what_sequences_hold_is_taken_from_experts() -> None:
    found = divide(MEASURED, ASKED, FIXED + 1000, needed_blocks=14, most_blocks=16)
    assert (found.expert_budget_bytes, found.kv_blocks, found.wanted_kv_blocks) == (860, 14, 4)
    with pytest.raises(BudgetError) as refused:
        divide(MEASURED, ASKED, FIXED + 300, needed_blocks=14, most_blocks=16)
    assert refused.value.minimum_bytes == FIXED + 340
    divide(MEASURED, ASKED, FIXED + 340, needed_blocks=14, most_blocks=16)


def test_an_expert_budget_is_a_ceiling() -> None:
    asked = replace(ASKED, expert_budget=Size(share=0.1))
    assert divide(MEASURED, asked, FIXED + 4000, needed_blocks=1, most_blocks=16).expert_budget_bytes == 500
    assert divide(MEASURED, asked, FIXED + 300, needed_blocks=1, most_blocks=16).expert_budget_bytes == 260


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 9000), st.integers(1, 16))
def test_the_parts_never_exceed_the_whole(room: int, needed: int) -> None:
    try:
        found = divide(MEASURED, ASKED, FIXED + room, needed_blocks=needed, most_blocks=16)
    except BudgetError as refused:
        assert refused.minimum_bytes > FIXED + room
        return
    assert found.expert_budget_bytes + found.kv_blocks * MEASURED.kv_block <= room
    assert needed <= found.kv_blocks <= 16 and found.expert_budget_bytes >= MEASURED.experts_minimum
