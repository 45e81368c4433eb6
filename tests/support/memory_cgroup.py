"""A memory cgroup around a child process: the kernel's word on what a program needs. Needs root; version 1 or 2."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_V1 = _ROOT / "memory"


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """A cgroup with a limit, swap aside. Processes enter it through `run`."""

    folder: Path
    version: int

    def run(self, command: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run `command` inside, from its first instruction on."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return subprocess.run(
            ["/bin/sh", "-c", enter, "sh", *command], timeout=timeout_s, capture_output=True, text=True
        )

    @property
    def peak_bytes(self) -> int:
        """The most that was ever charged, page cache included."""
        return int((self.folder / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")).read_text())

    @property
    def num_kills(self) -> int:
        """Processes that the kernel killed for want of memory."""
        events = (self.folder / ("memory.oom_control" if self.version == 1 else "memory.events")).read_text()
        return next(int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill "))


def can_limit_memory() -> bool:
    """Whether this process may make memory cgroups."""
    return os.geteuid() == 0 and _parent() is not None


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """A cgroup of `limit_bytes` for the length of the block; all processes must have left it by its end."""
    parent = _parent()
    assert parent is not None
    version = 1 if parent == _V1 else 2
    folder = parent / f"expertd-test-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")).write_text(str(limit_bytes))
        yield MemoryCgroup(folder, version)
    finally:
        folder.rmdir()


def _parent() -> Path | None:
    if (_V1 / "memory.limit_in_bytes").exists() and os.access(_V1, os.W_OK):
        return _V1
    controllers = _ROOT / "cgroup.subtree_control"
    if controllers.exists() and "memory" in controllers.read_text().split() and os.access(_ROOT, os.W_OK):
        return _ROOT
    return None
