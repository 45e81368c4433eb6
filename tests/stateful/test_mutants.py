"""Planted bugs: each patch in tests/mutants/, applied to a copy of the tree, must be found by the test it names.

A patch begins with `# found-by: tests/…` and, where the test has more than one thing to say, `# fails-with: …`, a text
of the failure (the law that is broken). Without it, any failure of the named test counts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROFILE = """
from hypothesis import Phase, settings
settings.register_profile("mutants", derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
settings.load_profile("mutants")
"""
"""The same examples each time, and no shrinking: that there is a counterexample is all we ask."""


@dataclass(frozen=True)
class Mutant:
    patch: Path
    found_by: str
    fails_with: str


def read_mutant(patch: Path) -> Mutant:
    headers = dict(line[2:].split(": ", 1) for line in patch.read_text().splitlines() if line.startswith("# "))
    return Mutant(patch, headers["found-by"], headers.get("fails-with", ""))


MUTANTS = [read_mutant(patch) for patch in sorted((ROOT / "tests" / "mutants").glob("*.patch"))]


class Copy:
    """A copy of engine/, server/ and tests/, whose tests import the copy and nothing else of ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("engine", "server", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "mutant_profile.py").write_text(PROFILE)

    def apply(self, patch: Path) -> None:
        outcome = self._run("git", "apply", "--verbose", str(patch))
        assert outcome.returncode == 0, f"{patch.name} no longer applies: {outcome.stderr}"

    def test(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run(sys.executable, "-m", "pytest", "-q", "-x", "-p", "mutant_profile", "--tb=short", *arguments)

    def imported_from(self) -> Path:
        source = "import expertd_engine; print(expertd_engine.__file__)"
        return Path(self._run(sys.executable, "-c", source).stdout.strip())

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(self.folder / name) for name in ("engine", "server", ".")),
            "PYTHONDONTWRITEBYTECODE": "1",
            "GIT_CEILING_DIRECTORIES": str(self.folder.parent),  # or git applies nothing inside another repository
        }
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)


def test_there_are_mutants() -> None:
    names = {mutant.patch.stem for mutant in MUTANTS}
    assert {"evict-leased", "count-entries", "double-release"} <= names


def test_the_copy_is_what_is_tested_and_has_every_named_test(tmp_path: Path) -> None:
    """That the unchanged tests pass, the rest of the suite says."""
    copy = Copy(tmp_path)
    assert copy.imported_from().is_relative_to(tmp_path)
    outcome = copy.test("--collect-only", *sorted({mutant.found_by for mutant in MUTANTS}))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.patch.stem for mutant in MUTANTS])
def test_the_mutant_is_found(mutant: Mutant, tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    copy.apply(mutant.patch)
    outcome = copy.test(mutant.found_by)
    assert outcome.returncode == 1, f"{mutant.patch.name} survived {mutant.found_by}: {outcome.stdout[-2000:]}"
    errors = [line for line in outcome.stdout.splitlines() if line.startswith("E ")]
    assert any(mutant.fails_with in line for line in errors), "\n".join([mutant.fails_with, *errors[:40]])
