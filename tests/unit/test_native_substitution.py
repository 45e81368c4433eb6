"""Who answers for what a row lacks, in native code, beside a plain account of the rule in C++."""

from __future__ import annotations

import pytest

from support.native_programs import SANITIZERS, build, run, sanitized


def test_rows_go_to_held_experts_by_the_rule() -> None:
    assert "checks on" in run(build("substitute_check"))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer: str) -> None:
    assert "checks on" in run(sanitized("substitute_check", sanitizer))
