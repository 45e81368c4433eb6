"""Programs in C++ around the native sources: built with sanitizers, or for processors that this box only emulates."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "engine" / "expertd_engine" / "kernels" / "native"
_FLAGS = ("-std=c++17", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-w", "-O1")


def needs(*programs: str) -> None:
    """Skip the test where one of them is not on the path."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} on the path")


def run(*command: object) -> str:
    """What it says; the test fails if it fails."""
    return _finish(command, 240)


def _finish(command: Sequence[object], timeout_s: float) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-8000:]}"
    return done.stdout


def emulated(*command: object) -> str:
    """What it says under qemu-aarch64. There a run has been seen with all threads parked for ever, which no run on a
    processor and no sanitizer has shown: it is begun anew then, three times at most.
    """
    for _ in range(3):
        try:
            return _finish(("qemu-aarch64", *command), 60)
        except subprocess.TimeoutExpired:
            print("an emulated run stood still for a minute")
    pytest.fail("three emulated runs stood still")


def build(source: str, folder: Path, compiler: str, *flags: str) -> Path:
    """The program of `tests/native/<source>.cpp` with all of the library's sources."""
    needs(compiler)
    program = folder / source
    sources = [*sorted(NATIVE.glob("*.cpp")), ROOT / "tests" / "native" / f"{source}.cpp"]
    run(compiler, *_FLAGS, *flags, f"-I{NATIVE}", *sources, "-o", program)
    return program
