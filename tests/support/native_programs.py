"""Programs in C++ around the native sources: built with sanitizers, or for processors that this box only emulates.

What is compiled is kept while the tests run, by what went into it, for every worker and every copy of the tree.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "engine" / "expertd_engine" / "kernels" / "native"
OBJECTS = "TESTS_OBJECTS"  # the variable that names the folder; see conftest.py
_FLAGS = ("-std=c++17", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-w", "-O1")

SANITIZERS = {
    "address,undefined": ("-Og",),  # its checks of vectors take the optimizer longer than they take to run
    "thread": (),
}


def needs(*programs: str) -> None:
    """Skip the test where one of them is not on the path."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} on the path")


def run(*command: object) -> str:
    """What it says; the test fails if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-8000:]}"
    return done.stdout


def emulated(*command: object) -> str:
    """What it says under qemu-aarch64; the test fails if it fails."""
    return run("qemu-aarch64", *command)


def build(check: str, compiler: str = "g++", *flags: str) -> Path:
    """The program of `tests/native/<check>.cpp` with all of the library's sources."""
    needs(compiler)
    command = [compiler, *_FLAGS, *flags]
    sources = [*sorted(NATIVE.glob("*.cpp")), ROOT / "tests" / "native" / f"{check}.cpp"]
    objects = [_object(command, source) for source in sources]
    key = _key(command, *(path.name for path in objects))
    return _kept(f"{check}-{key}", lambda target: run(*command, *objects, "-o", target))


def sanitized(check: str, sanitizer: str) -> Path:
    """The program with one of `SANITIZERS`, which ends it at what it finds."""
    return build(check, "g++", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", *SANITIZERS[sanitizer])


def _object(command: list[str], source: Path) -> Path:
    texts = [path.read_text() for path in sorted(_with_headers(source))]
    name = f"{source.stem}-{_key(command, *texts)}.o"
    return _kept(name, lambda target: run(*command, f"-I{NATIVE}", "-c", source, "-o", target))


def _with_headers(source: Path) -> set[Path]:
    """It and all of ours that it includes, however far."""
    found, left = set(), [source]
    while left:
        path = left.pop()
        found.add(path)
        names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
        beside = {folder / name for name in names for folder in (path.parent, NATIVE)}
        left += {header for header in beside - found if header.is_file()}
    return found


def _key(command: list[str], *parts: str) -> str:
    return hashlib.sha256("\0".join([*command, *parts]).encode()).hexdigest()[:24]


def _kept(name: str, make: Callable[[Path], object]) -> Path:
    """The file of this name, made by whoever asks first; others wait."""
    path = Path(os.environ[OBJECTS]) / name
    with path.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            half = path.with_name(f"{name}.half")
            make(half)
            half.rename(path)
    return path
