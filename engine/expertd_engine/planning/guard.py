"""What to do when the processes are measured above the memory budget in spite of the plan, and after it. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertBudget:
    """Bytes: what experts may take now, what they do take, the least that works, and what was planned or asked for."""

    now: int
    resident: int
    minimum: int
    planned: int


def guarded_expert_budget(used_bytes: int, memory_budget_bytes: int, experts: ExpertBudget) -> int:
    """The expert budget to go on with, given what all processes use.

    The plan is a prediction; experts are what can be given back at once, so they pay for whatever it did not foresee.
    What they gave comes back by halves of what is free, slots that are granted but still empty counted as taken.
    """
    excess = used_bytes - memory_budget_bytes
    if excess > 0:
        return max(experts.minimum, experts.now - excess)
    free = -excess - (experts.now - experts.resident)
    return experts.now + max(0, min(free // 2, experts.planned - experts.now))
