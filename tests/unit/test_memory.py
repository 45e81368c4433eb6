"""What the kernel says of processes and cgroups, read from the real /proc and from made-up cgroup folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import expertd_engine.memory as memory
from expertd_engine.experts.slab import Slab
from expertd_engine.memory import (
    MemoryCgroup,
    MemoryMeter,
    available_bytes,
    peak_rss_bytes,
    process_tree,
    proportional_bytes,
    reset_peak_rss,
    rss_bytes,
    unchanged_code,
)

MIB = 2**20


@pytest.fixture
def child() -> subprocess.Popen[bytes]:
    """A process that waits for a line on its standard input and then ends."""
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def end(child: subprocess.Popen[bytes]) -> None:
    child.communicate(b"\n")


def test_a_tree_holds_its_root_and_living_children(child: subprocess.Popen[bytes]) -> None:
    assert {os.getpid(), child.pid} <= set(process_tree(os.getpid()))
    assert process_tree(child.pid) == [child.pid]
    end(child)
    assert child.pid not in process_tree(os.getpid())


def test_a_child_that_has_ended_counts_nothing_reaped_or_not(child: subprocess.Popen[bytes]) -> None:
    assert proportional_bytes(child.pid) > 0 and peak_rss_bytes(child.pid) > 0
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert child.pid in process_tree(os.getpid())
    assert (proportional_bytes(child.pid), peak_rss_bytes(child.pid)) == (0, 0)
    assert MemoryMeter(os.getpid()).measure().used_bytes > 0
    child.wait()
    assert (proportional_bytes(child.pid), peak_rss_bytes(child.pid)) == (0, 0)


def test_only_code_as_its_file_has_it_may_be_dropped() -> None:
    mappings = {
        "1000-3000 r-xp 00000000 fe:00 26 /usr/lib/some.so": 0,
        "3000-4000 r--p 00002000 fe:00 26 /usr/lib/some.so": 0,
        "4000-5000 r-xp 00000000 fe:00 27 /usr/lib/patched.so": 4,
        "5000-6000 r-xp 00000000 00:00 0 [vdso]": 0,
        "6000-7000 rwxp 00000000 fe:00 28 /tmp/made": 0,
        "8000-9000 r-xp 00001000 fe:00 29 /usr/lib/with space.so (deleted)": 0,
    }
    smaps = "".join(f"{line}\nSize: 4 kB\nAnonymous:   {kib} kB\nVmFlags: rd\n" for line, kib in mappings.items())
    assert unchanged_code(smaps) == [(0x1000, 0x3000), (0x8000, 0x9000)]


def test_what_starting_up_has_touched_is_given_back() -> None:
    program = """
from expertd_engine.memory import fields_kib, release_free_memory
import hashlib, ssl, sqlite3
from pathlib import Path
mapped = lambda: fields_kib(Path("/proc/self/status"))["RssFile"]
before = mapped()
release_free_memory()
print(before, mapped(), hashlib.sha256(b"abc").hexdigest()[:8])
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    before_kib, after_kib, digest = done.stdout.split()
    assert int(after_kib) < int(before_kib)
    assert digest == "ba7816bf", "code that was given back runs again"


def test_the_peak_is_kept_until_it_is_reset() -> None:
    reset_peak_rss()
    before = rss_bytes()
    slab = Slab(1, 64 * MIB)
    slab.view(0, 64 * MIB)[:] = b"\1" * (64 * MIB)
    slab.drop(0)
    assert peak_rss_bytes() >= before + 64 * MIB
    reset_peak_rss()
    assert peak_rss_bytes() < before + 64 * MIB


def test_what_is_available_is_what_the_system_says_at_most() -> None:
    assert 0 < available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def make_v2(folder: Path, *, limit: str = "max", pids: str = "1\n") -> MemoryCgroup:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.current").write_text("1000\n")
    (folder / "memory.peak").write_text("1500\n")
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "cgroup.procs").write_text(pids)
    stat = "anon 300\nfile_mapped 50\ninactive_file 200\nactive_file 100\nslab_reclaimable 30\n"
    (folder / "memory.stat").write_text(stat)
    return MemoryCgroup(folder, 2)


def test_a_version_2_group(tmp_path: Path) -> None:
    group = make_v2(tmp_path, limit="5000", pids="3\n7\n")
    assert group.used_bytes() == 1000 - (200 + 100 - 50) - 30
    assert (group.peak_bytes(), group.limit_bytes(), group.pids()) == (1500, 5000, {3, 7})
    assert make_v2(tmp_path).limit_bytes() is None


def test_a_version_1_group(tmp_path: Path) -> None:
    (tmp_path / "memory.usage_in_bytes").write_text("1000")
    (tmp_path / "memory.max_usage_in_bytes").write_text("1500")
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712")
    (tmp_path / "memory.stat").write_text("total_mapped_file 50\ntotal_inactive_file 200\ntotal_active_file 100\n")
    group = MemoryCgroup(tmp_path, 1)
    assert (group.used_bytes(), group.peak_bytes(), group.limit_bytes()) == (750, 1500, None)


class Box:
    """A made-up /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        monkeypatch.setattr(memory, "_PROC", self.proc)
        monkeypatch.setattr(memory, "_CGROUPS", self.cgroups)
        self.cgroups.mkdir()

    def process(self, pid: int, cgroup: str) -> None:
        (self.proc / str(pid)).mkdir(parents=True)
        (self.proc / str(pid) / "cgroup").write_text(cgroup)


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(tmp_path, monkeypatch)


def test_a_process_group_is_found_by_its_path(box: Box) -> None:
    box.process(7, "1:name=systemd:/x\n0::/a.slice/b\n")
    make_v2(box.cgroups / "a.slice" / "b")
    assert memory.find_cgroup(7) == MemoryCgroup(box.cgroups / "a.slice" / "b", 2)


@pytest.mark.parametrize("path", ["/", "/docker/0123"])
def test_a_container_finds_its_group_at_the_mounts_root(box: Box, path: str) -> None:
    box.process(7, f"0::{path}\n")
    make_v2(box.cgroups)
    group = memory.find_cgroup(7)
    assert group is not None and (group.folder.resolve(), group.version) == (box.cgroups, 2)


def test_a_version_1_group_is_found_among_other_controllers(box: Box) -> None:
    box.process(7, "3:cpu,cpuacct:/c\n2:memory:/m\n")
    (box.cgroups / "memory" / "m").mkdir(parents=True)
    (box.cgroups / "memory" / "m" / "memory.usage_in_bytes").touch()
    assert memory.find_cgroup(7) == MemoryCgroup(box.cgroups / "memory" / "m", 1)


def test_the_root_group_of_a_box_is_none(box: Box) -> None:
    box.process(7, "0::/\n")
    assert memory.find_cgroup(7) is None
