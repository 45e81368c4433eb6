"""Every error a user can meet, with the exit code it ends a process with.

A message names the value at fault and what is allowed. `server` and `engine` raise these; the command line prints the
message on one line and exits with `exit_code`; HTTP maps them in `expertd_server.errors` and nowhere else.
"""

from __future__ import annotations

from typing import ClassVar


class ExpertdError(Exception):
    """Base of all errors that carry a message meant for the user."""

    exit_code: ClassVar[int] = 5


class UsageError(ExpertdError):
    """The command line itself is wrong (exit code 2)."""

    exit_code = 2


class ConfigError(ExpertdError):
    """A configuration value is unknown, malformed or contradicts another (exit code 3)."""

    exit_code = 3


class ModelError(ExpertdError):
    """The model cannot be served: missing, foreign, or of a family we cannot serve exactly (exit code 3)."""

    exit_code = 3


class StoreError(ModelError):
    """An expert store is truncated, corrupted, foreign or of another format version (exit code 3)."""


class ResourceError(ExpertdError):
    """The box lacks something: a free port, memory inside the budget, disk space (exit code 4)."""

    exit_code = 4


class BudgetError(ResourceError):
    """A byte budget is too small. Names the budget, the shortfall and the smallest budget that works."""

    def __init__(self, what: str, budget_bytes: int, minimum_bytes: int, detail: str = "") -> None:
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        super().__init__(
            f"{what} of {budget_bytes} bytes is {minimum_bytes - budget_bytes} bytes too small: "
            f"the smallest that works is {minimum_bytes} bytes{_rounded(minimum_bytes)}"
            + (f" ({detail})" if detail else "")
        )


def _rounded(count: int) -> str:
    """Also as a size that suffices and is easily written."""
    return f", {-(-count // 2**20)}MiB" if count >= 2**20 else ""


class EngineError(ExpertdError):
    """The engine process failed (exit code 5)."""
