"""What the processes really occupy, as the kernel says it. Reads /proc and the memory cgroup; decides nothing.

*Used* is what a cgroup around server, engine and children is charged, less page cache that can be reclaimed without
refaulting code (inactive and unmapped file pages). In a memory cgroup that holds these processes and no others the
figures are the cgroup's own; elsewhere they are the processes' proportional set sizes.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_MADV_DONTNEED = 4
_MAPPING = re.compile(r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<rights>\S+) \S+ \S+ (?P<inode>\d+)")


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes. `source` is `cgroup` or `process`; a cgroup's peak includes page cache, a process's peak does not."""

    used_bytes: int
    peak_bytes: int
    source: str


def fields_kib(path: Path) -> dict[str, int]:
    """`Name:  123 kB` lines of a /proc file, in bytes."""
    values = {}
    for line in path.read_text().splitlines():
        parts = line.split()
        if len(parts) == 3 and parts[2] == "kB":
            values[parts[0].rstrip(":")] = int(parts[1]) * 1024
    return values


def process_tree(root: int) -> list[int]:
    """`root` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # ended while we looked
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    tree, pending = [], [root]
    while pending:
        pid = pending.pop()
        tree.append(pid)
        pending += children.get(pid, [])
    return tree


def proportional_bytes(pid: int) -> int:
    """Proportional set size: private pages plus this process's share of the pages it shares. 0 once it has ended."""
    try:
        return fields_kib(_PROC / str(pid) / "smaps_rollup")["Pss"]
    except OSError:
        return 0


def peak_rss_bytes(pid: int | str = "self") -> int:
    """The kernel's high-water mark of the resident set (`VmHWM`). 0 once it has ended, reaped or not."""
    try:
        return fields_kib(_PROC / str(pid) / "status").get("VmHWM", 0)
    except OSError:
        return 0


def rss_bytes() -> int:
    """This process's resident set."""
    return fields_kib(_PROC / "self" / "status")["VmRSS"]


def release_free_memory() -> None:
    """Hand back what the allocator keeps for later, and the pages of code that only starting up has run: what is
    measured then is what is in use. Code that is run again comes back from the page cache by itself."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    for start, end in unchanged_code((_PROC / "self" / "smaps").read_text()):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def unchanged_code(smaps: str) -> list[tuple[int, int]]:
    """Address ranges of files' code in /proc/PID/smaps: mapped to be run, private, and as the file has it."""
    found: list[tuple[int, int]] = []
    start, end, is_code = 0, 0, False
    for line in smaps.splitlines():
        if header := _MAPPING.match(line):
            start, end = int(header["start"], 16), int(header["end"], 16)
            is_code = header["rights"] == "r-xp" and header["inode"] != "0"
        elif is_code and line.split() == ["Anonymous:", "0", "kB"]:
            found.append((start, end))
    return found


def reset_peak_rss() -> bool:
    """Set this process's high-water mark back to its present resident set (proc(5), clear_refs 5).

    False where the system does not allow it: then the mark is the highest since the process began.
    """
    try:
        (_PROC / "self" / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available_bytes() -> int:
    """What could be allocated now without swapping: the system's estimate or the cgroup's headroom, if smaller."""
    available = fields_kib(_PROC / "meminfo")["MemAvailable"]
    group = find_cgroup(os.getpid())
    limit = group.limit_bytes() if group else None
    return available if group is None or limit is None else min(available, limit - group.used_bytes())


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """A memory cgroup's folder, version 1 or 2."""

    folder: Path
    version: int

    def pids(self) -> set[int]:
        return {int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()}

    def limit_bytes(self) -> int | None:
        text = (self.folder / ("memory.max" if self.version == 2 else "memory.limit_in_bytes")).read_text().strip()
        return None if text == "max" or int(text) >= 2**62 else int(text)

    def used_bytes(self) -> int:
        stat = self._stat()
        total = "" if self.version == 2 else "total_"
        current = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        mapped = stat["file_mapped" if self.version == 2 else "total_mapped_file"]
        cache = stat[f"{total}inactive_file"] + stat[f"{total}active_file"]
        reclaimable = max(0, cache - mapped) + stat.get("slab_reclaimable", 0)
        return max(0, int((self.folder / current).read_text()) - reclaimable)

    def peak_bytes(self) -> int:
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        return int((self.folder / name).read_text())

    def _stat(self) -> dict[str, int]:
        lines = (line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return {name: int(value) for name, value in lines}


def find_cgroup(pid: int) -> MemoryCgroup | None:
    """The memory cgroup of a process; None where there is no controller.

    A container with a cgroup namespace calls its own group `/`. So does a box its root group, which in version 1 has
    no limit and holds other processes, and in version 2 has no `memory.current`.
    """
    for line in (_PROC / str(pid) / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, version = _CGROUPS, 2
        elif "memory" in controllers.split(","):
            root, version = _CGROUPS / "memory", 1
        else:
            continue
        # A container sees its own group at the mount's root, whatever path the host calls it by.
        for folder in (root / path.removeprefix("/"), root):
            if (folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")).exists():
                return MemoryCgroup(folder, version)
    return None


class MemoryMeter:
    """Measures server, engine and their children. `server_pid` is the root of the tree."""

    def __init__(self, server_pid: int) -> None:
        self.server_pid = server_pid

    def own_cgroup(self) -> MemoryCgroup | None:
        """The cgroup that holds exactly our processes, if there is one."""
        group = find_cgroup(self.server_pid)
        return group if group is not None and group.pids() <= set(process_tree(self.server_pid)) else None

    def measure(self) -> MemoryUse:
        group = self.own_cgroup()
        if group is not None:
            return MemoryUse(group.used_bytes(), group.peak_bytes(), "cgroup")
        tree = process_tree(self.server_pid)
        used = sum(proportional_bytes(pid) for pid in tree)
        return MemoryUse(used, sum(peak_rss_bytes(pid) for pid in tree), "process")
