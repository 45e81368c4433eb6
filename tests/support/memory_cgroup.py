"""A memory cgroup around a child process: the kernel's word on what a program needs. Needs root; version 1 or 2."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from expertd_engine.bench.cgroup import inside, limited_memory, num_kills, parent_folder
from expertd_engine.errors import ResourceError
from expertd_engine.memory import MemoryCgroup

__all__ = ["MemoryCgroup", "can_limit_memory", "limited_memory", "num_kills", "run_inside"]


def can_limit_memory() -> bool:
    """Whether this process may make memory cgroups."""
    try:
        parent, _ = parent_folder()
    except ResourceError:
        return False
    return os.geteuid() == 0 and os.access(parent, os.W_OK)


def run_inside(group: MemoryCgroup, command: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run `command` in the cgroup, from its first instruction on."""
    return subprocess.run(inside(group, command), timeout=timeout_s, capture_output=True, text=True)
