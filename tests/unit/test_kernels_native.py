"""The kernels outside Python: with sanitizers, and for processors that this box only emulates."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support.native_programs import emulated

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "engine" / "expertd_engine" / "kernels" / "native"
SOURCES = [
    *(NATIVE / f"{name}.cpp" for name in ("errors", "isa", "linear", "moe", "pool")),
    *(NATIVE / f"isa_{name}.cpp" for name in ("portable", "avx2", "avx512", "neon")),
    ROOT / "tests" / "native" / "kernel_check.cpp",
]
FLAGS = ("-std=c++17", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-w")


def _needs(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} on the path")


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-8000:]}"
    return done.stdout


def _build(folder: Path, compiler: str, *flags: str) -> Path:
    """kernel_check from the sources of this tree."""
    program = folder / "kernel_check"
    _run(compiler, *FLAGS, *flags, f"-I{NATIVE}", *SOURCES, "-o", program)
    return program


def _bits(said: str) -> str:
    return said.splitlines()[-1]


@pytest.fixture(scope="module")
def said_here(tmp_path_factory: pytest.TempPathFactory) -> str:
    _needs("g++")
    return _run(_build(tmp_path_factory.mktemp("here"), "g++", "-O1"))


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _needs("aarch64-linux-gnu-g++", "qemu-aarch64")  # Debian: g++-aarch64-linux-gnu and qemu-user
    return _build(tmp_path_factory.mktemp("arm"), "aarch64-linux-gnu-g++", "-O1", "-static")


def test_the_sums_are_right_and_the_bits_the_same(said_here: str) -> None:
    assert "checks on" in said_here


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path: Path, sanitizer: str) -> None:
    _needs("g++")
    program = _build(tmp_path, "g++", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    assert "checks on" in _run(program)


@pytest.mark.slow
def test_neon_gives_the_bits_that_this_processor_gives(arm_program: Path, said_here: str) -> None:
    said = emulated(arm_program)
    assert "on neon portable" in said and _bits(said) == _bits(said_here)


@pytest.mark.slow
def test_an_arm_processor_without_dot_products_runs_the_portable_path(arm_program: Path, said_here: str) -> None:
    said = emulated("-cpu", "cortex-a53", arm_program)
    assert "on portable\n" in said and _bits(said) == _bits(said_here)
