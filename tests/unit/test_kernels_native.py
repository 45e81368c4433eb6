"""The kernels outside Python: with sanitizers, and for processors that this box only emulates."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.native_programs import SANITIZERS, build, emulated, needs, run, sanitized


def _bits(said: str) -> str:
    return said.splitlines()[-1]


@pytest.fixture(scope="module")
def said_here() -> str:
    return run(build("kernel_check"))


@pytest.fixture(scope="module")
def arm_program() -> Path:
    needs("qemu-aarch64")  # Debian: qemu-user, g++-aarch64-linux-gnu
    return build("kernel_check", "aarch64-linux-gnu-g++", "-static")


def test_the_sums_are_right_and_the_bits_the_same(said_here: str) -> None:
    assert "checks on" in said_here


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer: str) -> None:
    assert "checks on" in run(sanitized("kernel_check", sanitizer))


@pytest.mark.slow
def test_neon_gives_the_bits_that_this_processor_gives(arm_program: Path, said_here: str) -> None:
    said = emulated(arm_program)
    assert "on neon portable" in said and _bits(said) == _bits(said_here)


@pytest.mark.slow
def test_an_arm_processor_without_dot_products_runs_the_portable_path(arm_program: Path, said_here: str) -> None:
    said = emulated("-cpu", "cortex-a53", arm_program)
    assert "on portable\n" in said and _bits(said) == _bits(said_here)
