"""A memory cgroup around processes that are measured: the kernel's limit, its peak, its kills. Needs root.

Version 1 or 2, whichever the box has. Owns the folder that it makes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from expertd_engine.errors import ResourceError
from expertd_engine.memory import MemoryCgroup

_ROOT = Path("/sys/fs/cgroup")
_V1 = _ROOT / "memory"
_EMPTY_S = 10.0
_numbers = count()


@contextmanager
def limited_memory(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """A new cgroup of `limit_bytes`, without swap, for the block. Raises ResourceError where none can be made."""
    parent, version = parent_folder()
    folder = parent / f"expertd-bench-{os.getpid()}-{next(_numbers)}"
    try:
        folder.mkdir()
    except OSError as error:
        raise ResourceError(f"cannot make a memory cgroup in {parent}: {error.strerror}; it needs root") from error
    try:
        (folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")).write_text(str(limit_bytes))
        _forbid_swap(folder, version, limit_bytes)
        yield MemoryCgroup(folder, version)
    finally:
        _remove(folder)


def inside(group: MemoryCgroup, command: Sequence[str]) -> list[str]:
    """`command` as one that enters the cgroup before its first instruction."""
    return ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group.folder), *command]


def num_kills(group: MemoryCgroup) -> int:
    """Processes of the group that the kernel killed for want of memory."""
    events = (group.folder / ("memory.oom_control" if group.version == 1 else "memory.events")).read_text()
    return next((int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill ")), 0)


def parent_folder() -> tuple[Path, int]:
    """Where memory cgroups of this box are made, and their version. Raises ResourceError where there are none."""
    if (_V1 / "memory.limit_in_bytes").exists():
        return _V1, 1
    controllers = _ROOT / "cgroup.subtree_control"
    if controllers.exists() and "memory" in controllers.read_text().split():
        return _ROOT, 2
    raise ResourceError(f"this box has no memory cgroups below {_ROOT}")


def _forbid_swap(folder: Path, version: int, limit_bytes: int) -> None:
    """Where the kernel counts swap; elsewhere there is none to count."""
    path = folder / ("memory.memsw.limit_in_bytes" if version == 1 else "memory.swap.max")
    if path.exists():
        path.write_text(str(limit_bytes) if version == 1 else "0")


def _remove(folder: Path) -> None:
    """The last process of a group is gone a moment after it was waited for."""
    until_s = time.monotonic() + _EMPTY_S
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.05)
