"""What a budget that changes while requests run means for experts and KV. Pure.

KV gives way first, but never what live sequences hold or may yet need: no request is lost to a smaller budget. So the
part of a lower budget that KV cannot give now is the experts', until the sequences have ended.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from expertd_engine.config import Size
from expertd_engine.errors import BudgetError
from expertd_engine.planning.startup_plan import Asked, Measured, plan_memory


@dataclass(frozen=True, slots=True)
class Division:
    """What the budget is divided into."""

    expert_budget_bytes: int
    kv_blocks: int
    wanted_kv_blocks: int
    """Once no sequence holds more: `kv_blocks` may be above."""


def divide(
    measured: Measured, asked: Asked, memory_budget_bytes: int, *, needed_blocks: int, most_blocks: int
) -> Division:
    """The budget's parts as at start, but KV keeps `needed_blocks` and cannot have more than `most_blocks`.

    An expert budget in `asked` is a ceiling here. Raises BudgetError with the smallest budget that works now.
    """
    free = replace(asked, expert_budget=None, memory_budget=Size(bytes=memory_budget_bytes))
    plan = plan_memory(measured, free)
    blocks = min(most_blocks, max(plan.kv_blocks, needed_blocks))
    experts = plan.expert_budget_bytes - max(0, blocks - plan.kv_blocks) * measured.kv_block
    if experts < measured.experts_minimum:
        smallest = memory_budget_bytes + measured.experts_minimum - experts
        detail = f"running sequences hold {needed_blocks} KV blocks of {measured.kv_block} bytes"
        raise BudgetError("memory budget", memory_budget_bytes, smallest, detail)
    ceiling = (
        measured.experts_total if asked.expert_budget is None else asked.expert_budget.resolve(measured.experts_total)
    )
    return Division(min(experts, ceiling), blocks, min(plan.kv_blocks, most_blocks))
