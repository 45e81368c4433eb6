"""What to do when the processes are measured above the memory budget in spite of the plan. Pure."""

from __future__ import annotations


def guarded_expert_budget(
    *, used_bytes: int, memory_budget_bytes: int, expert_budget_bytes: int, minimum_bytes: int
) -> int | None:
    """The expert budget that brings memory back inside its budget; None when it is inside, or nothing is left to give.

    The plan is a prediction; experts are what can be given back at once, so they pay for whatever it did not foresee.
    """
    excess = used_bytes - memory_budget_bytes
    if excess <= 0 or expert_budget_bytes <= minimum_bytes:
        return None
    return max(minimum_bytes, expert_budget_bytes - excess)
