"""Divides the memory budget at start: what was measured comes off the top, experts and KV share the rest. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from expertd_engine.config import Size
from expertd_engine.errors import BudgetError

GROWTH_BYTES = 64 * 2**20
"""What server and engine may grow by while they serve: connections, tokenizer buffers, the allocator's fragments."""
KV_BYTES_UNASKED = 2**30
"""KV memory taken when no memory budget is set and more than one full sequence would fit."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes, but for `block_tokens` and `experts_needed`."""

    base: int
    """Server and engine with the dense weights loaded, before slots and KV."""
    step: int
    """What the largest step adds at its peak, slots and KV excluded."""
    experts_minimum: int
    """Smallest expert budget: two slots of the largest record, and what held sets need."""
    experts_total: int
    kv_block: int
    block_tokens: int
    available: int
    """What the box or cgroup could still give, at the same moment as `base`."""
    experts_needed: str = "one expert computing, one loading"
    """What `experts_minimum` is for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the operator wants. `expert_budget`, `memory_budget`, `kv_budget`: None means planned."""

    expert_budget: Size | None
    memory_budget: Size | None
    kv_budget: Size | None
    max_model_len: int
    max_sequences: int


@dataclass(frozen=True, slots=True)
class StartupPlan:
    expert_budget_bytes: int
    kv_blocks: int
    """Usable blocks; the null block comes on top and occupies nothing."""
    memory_budget_bytes: int | None


def plan_memory(measured: Measured, asked: Asked) -> StartupPlan:
    """Slots and KV blocks inside the budget. Raises BudgetError with the exact shortfall and the smallest that works.

    Experts get what one full sequence's KV leaves; once all are resident, the rest is KV for more sequences.
    """
    blocks_each = -(-asked.max_model_len // measured.block_tokens)
    kv_minimum = blocks_each * measured.kv_block
    experts = _asked_experts(measured, asked)
    kv = _asked_kv(measured, asked, kv_minimum)
    room = _room(measured, asked, (experts or measured.experts_minimum) + (kv or kv_minimum), kv_minimum)
    if experts is None:
        experts = min(measured.experts_total, room - (kv or kv_minimum))
    if kv is None:
        kv = min(room - experts, asked.max_sequences * kv_minimum)
        if asked.memory_budget is None:
            kv = max(kv_minimum, min(kv, KV_BYTES_UNASKED))
    budget = asked.memory_budget.bytes if asked.memory_budget else None
    return StartupPlan(experts, kv // measured.kv_block, budget)


def most_kv_blocks(measured: Measured, asked: Asked) -> int:
    """What KV could ever be used, however large a budget becomes while serving: addresses are kept for so much."""
    every = asked.max_sequences * -(-asked.max_model_len // measured.block_tokens)
    return min(every, measured.available // measured.kv_block)


def _asked_experts(measured: Measured, asked: Asked) -> int | None:
    if asked.expert_budget is None:
        return None
    budget = asked.expert_budget.resolve(measured.experts_total)
    if budget < measured.experts_minimum:
        raise BudgetError("--expert-budget", budget, measured.experts_minimum, measured.experts_needed)
    return min(budget, measured.experts_total)


def _asked_kv(measured: Measured, asked: Asked, minimum: int) -> int | None:
    if asked.kv_budget is None:
        return None
    budget = asked.kv_budget.resolve(0)
    if budget < minimum:
        raise BudgetError("--kv-budget", budget, minimum, f"one sequence of {asked.max_model_len} tokens")
    return min(budget, asked.max_sequences * minimum)


def _room(measured: Measured, asked: Asked, needed: int, kv_minimum: int) -> int:
    """Bytes for experts and KV together, at least `needed`."""
    fixed = measured.step + GROWTH_BYTES
    detail = (
        f"processes and dense weights {measured.base}, largest step {measured.step}, growth {GROWTH_BYTES}, experts "
        f"and KV {needed}, of which {kv_minimum} for one sequence of --max-model-len {asked.max_model_len}"
    )
    if asked.memory_budget is None:
        room = measured.available - fixed
        if room < needed:
            raise BudgetError("available memory", measured.available, fixed + needed, detail)
        return room
    budget = asked.memory_budget.resolve(0)
    room = budget - measured.base - fixed
    if room < needed:
        raise BudgetError("--memory-budget", budget, measured.base + fixed + needed, detail)
    return room
