"""Programs in C++ around the native sources: built with sanitizers, or for processors that this box only emulates."""

from __future__ import annotations

import shutil
import subprocess
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
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-8000:]}"
    return done.stdout


def emulated(*command: object) -> str:
    """What it says under qemu-aarch64; the test fails if it fails."""
    return run("qemu-aarch64", *command)


def build(source: str, folder: Path, compiler: str, *flags: str) -> Path:
    """The program of `tests/native/<source>.cpp` with all of the library's sources."""
    needs(compiler)
    program = folder / source
    sources = [*sorted(NATIVE.glob("*.cpp")), ROOT / "tests" / "native" / f"{source}.cpp"]
    run(compiler, *_FLAGS, *flags, f"-I{NATIVE}", *sources, "-o", program)
    return program
