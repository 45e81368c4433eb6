"""The division of memory at start: nothing is promised twice, and a refusal names a budget that works."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_engine.config import Size
from expertd_engine.errors import BudgetError
from expertd_engine.planning.startup_plan import (
    GROWTH_BYTES,
    KV_BYTES_UNASKED,
    Asked,
    Measured,
    StartupPlan,
    plan_memory,
)

MIB = 2**20
MEASURED = Measured(
    base=300 * MIB,
    step=40 * MIB,
    experts_minimum=2 * MIB,
    experts_total=100 * MIB,
    kv_block=MIB,
    block_tokens=16,
    available=4096 * MIB,
)
ASKED = Asked(None, None, None, max_model_len=100, max_sequences=8)
"""A full sequence takes 7 blocks."""


def test_with_room_for_all_every_expert_and_every_sequence_fits() -> None:
    plan = plan_memory(MEASURED, ASKED)
    assert (plan.expert_budget_bytes, plan.kv_blocks, plan.memory_budget_bytes) == (100 * MIB, 7 * 8, None)


def test_unasked_kv_is_bounded_but_holds_one_sequence() -> None:
    roomy = replace(MEASURED, available=2**40)
    assert plan_memory(roomy, replace(ASKED, max_sequences=4096)).kv_blocks == KV_BYTES_UNASKED // MIB
    long = replace(ASKED, max_model_len=16 * 2000)
    assert plan_memory(roomy, long).kv_blocks == 2000


def test_under_a_memory_budget_experts_come_before_more_sequences() -> None:
    fixed = MEASURED.base + MEASURED.step + GROWTH_BYTES
    tight = plan_memory(MEASURED, replace(ASKED, memory_budget=Size(bytes=fixed + 50 * MIB)))
    assert (tight.expert_budget_bytes, tight.kv_blocks) == (43 * MIB, 7)
    roomy = plan_memory(MEASURED, replace(ASKED, memory_budget=Size(bytes=fixed + 120 * MIB)))
    assert (roomy.expert_budget_bytes, roomy.kv_blocks) == (100 * MIB, 20)


def test_what_is_asked_is_given_up_to_what_can_be_used() -> None:
    asked = replace(ASKED, expert_budget=Size(share=0.25), kv_budget=Size(bytes=10 * MIB + 1))
    plan = plan_memory(MEASURED, asked)
    assert (plan.expert_budget_bytes, plan.kv_blocks) == (25 * MIB, 10)
    most = plan_memory(MEASURED, replace(ASKED, expert_budget=Size(bytes=2**50), kv_budget=Size(bytes=2**50)))
    assert (most.expert_budget_bytes, most.kv_blocks) == (100 * MIB, 56)


@pytest.mark.parametrize(
    ("name", "too_small"), [("expert_budget", MIB), ("kv_budget", 6 * MIB), ("memory_budget", 300 * MIB)]
)
def test_a_budget_too_small_is_refused_with_the_smallest_that_works(name: str, too_small: int) -> None:
    def plan(size: int) -> StartupPlan:
        budget = Size(bytes=size)
        return plan_memory(
            MEASURED,
            Asked(
                budget if name == "expert_budget" else None,
                budget if name == "memory_budget" else None,
                budget if name == "kv_budget" else None,
                ASKED.max_model_len,
                ASKED.max_sequences,
            ),
        )

    with pytest.raises(BudgetError, match=rf"^--{name.replace('_', '-')} of {too_small} bytes") as raised:
        plan(too_small)
    smallest = raised.value.minimum_bytes
    plan(smallest)
    with pytest.raises(BudgetError):
        plan(smallest - 1)


def test_a_box_too_small_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"^available memory of ") as raised:
        plan_memory(replace(MEASURED, available=100 * MIB), ASKED)
    plan_memory(replace(MEASURED, available=raised.value.minimum_bytes), ASKED)


_SIZES = st.none() | st.integers(1, 2**30).map(lambda n: Size(bytes=n))


@given(_SIZES, _SIZES, _SIZES, st.integers(1, 5000), st.integers(1, 64), st.integers(2**20, 2**31))
def test_a_plan_never_exceeds_what_there_is(
    experts: Size | None, memory: Size | None, kv: Size | None, length: int, sequences: int, available: int
) -> None:
    measured = replace(MEASURED, available=available)
    try:
        plan = plan_memory(measured, Asked(experts, memory, kv, length, sequences))
    except BudgetError as error:
        assert error.minimum_bytes > error.budget_bytes
        return
    planned = plan.expert_budget_bytes + plan.kv_blocks * measured.kv_block + measured.step + GROWTH_BYTES
    assert planned + (measured.base if memory else 0) <= (memory.resolve(0) if memory else available)
    assert measured.experts_minimum <= plan.expert_budget_bytes <= measured.experts_total
    assert plan.kv_blocks * measured.block_tokens >= length
    assert experts is None or plan.expert_budget_bytes <= experts.resolve(0)
    assert kv is None or plan.kv_blocks * measured.kv_block <= kv.resolve(0)
