"""What code calls: where two ways must do the very same, what they call tells more than what they took."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any


def calls_of(run: Callable[[], object], among: str = "expertd_engine") -> Counter[tuple[str, str]]:
    """How often `run` calls each Python function of modules so named or inside, by module and qualified name; of this
    thread alone.
    """
    found: Counter[tuple[str, str]] = Counter()

    def see(frame: FrameType, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and f"{module}.".startswith(f"{among}."):
            found[module, frame.f_code.co_qualname] += 1

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found
