"""Planted bugs: each patch in tests/mutants/, applied to a copy of the tree, must be found by the test it names.

A patch begins with `# found-by: tests/…` and, where the test has more than one thing to say, `# fails-with: …`, a text
of the failure (the law that is broken; `a | b`: either, where it depends on what is drawn). Without it, any failure of
the named test counts. `# shows-with: …`: something in NEEDED, without which the bug changes nothing that can be seen.
One process a worker imports what is heavy and not ours once, and forks for each copy.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from support.zygote import Run, Zygote

ROOT = Path(__file__).resolve().parents[2]
TREES = ("engine", "server", "tests")
LARGE_BYTES = 1_000_000

PROFILE = f"""
import os, sys
from hypothesis import Phase, settings
settings.register_profile("mutants", derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
settings.load_profile("mutants")

def pytest_sessionfinish():
    others = set(sys.modules) - {{"__main__", "__mp_main__"}}  # the zygote's own
    files = {{os.path.realpath(getattr(sys.modules[name], "__file__", None) or "/") for name in others}}
    foreign = sorted(file for file in files if file.startswith({tuple(f"{ROOT / name}{os.sep}" for name in TREES)!r}))
    assert not foreign, f"not of the copy: {{foreign}}"
"""
"""The same examples each time, and no shrinking: that there is a counterexample is all we ask. And nothing of ours may
come from elsewhere than the copy."""


@dataclass(frozen=True)
class Mutant:
    patch: Path
    found_by: str
    fails_with: str
    shows_with: str | None


def _bfloat16_differs_by_rows() -> bool:
    """Whether a row's product with a matrix in bfloat16 has other bits beside other rows: not without AVX-512."""
    generator = torch.Generator().manual_seed(0)
    for cols, outputs in ((16, 32), (32, 64), (64, 32), (48, 64), (64, 128), (128, 64)):
        x, w = (torch.randn(rows, cols, generator=generator).bfloat16() for rows in (37, outputs))
        whole = torch.nn.functional.linear(x, w)
        if any(not torch.equal(torch.nn.functional.linear(x[:n], w), whole[:n]) for n in range(1, 37)):
            return True
    return False


NEEDED: dict[str, Callable[[], bool]] = {"products in bfloat16 that differ by rows": _bfloat16_differs_by_rows}
"""What some processors have, and how it is found out."""


def read_mutant(patch: Path) -> Mutant:
    headers = dict(line[2:].split(": ", 1) for line in patch.read_text().splitlines() if line.startswith("# "))
    return Mutant(patch, headers["found-by"], headers.get("fails-with", ""), headers.get("shows-with"))


MUTANTS = [read_mutant(patch) for patch in sorted((ROOT / "tests" / "mutants").glob("*.patch"))]


def _place(source: str, target: str) -> str:
    """What is large is pointed to; no patch is for it."""
    if os.path.getsize(source) < LARGE_BYTES:
        return str(shutil.copy2(source, target))
    os.symlink(source, target)
    return target


class Copy:
    """A copy of engine/, server/ and tests/, whose tests import the copy and nothing else of ours.

    Byte code comes with it: Python takes that of files alone whose time and size are what they were.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in TREES:
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info"), copy_function=_place
            )
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "mutant_profile.py").write_text(PROFILE)

    def apply(self, patch: Path) -> None:
        # A ceiling, or git applies nothing inside another repository.
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(self.folder.parent)}
        command = ["git", "apply", "--verbose", str(patch)]
        outcome = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert outcome.returncode == 0, f"{patch.name} no longer applies: {outcome.stderr}"

    def test(self, zygote: Zygote, *arguments: str) -> tuple[int, str]:
        """The exit code, and what was said. Output is not captured, so that what hangs has said what it said."""
        paths = [str(self.folder / name) for name in ("engine", "server", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
        # Plain asserts: where CI is set, pytest diffs what an assert compared in full, which can take minutes.
        options = ("-q", "-x", "-s", "-p", "mutant_profile", "-p", "no:cacheprovider", "--tb=short", "--assert=plain")
        output = self.folder / "output"
        outcome = zygote.run(Run(str(self.folder), paths, [*options, *arguments], environment, str(output)))
        said = output.read_text(errors="replace")
        assert not outcome.overdue, f"it did not end:\n{said[-20_000:]}"
        return outcome.code, said


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as process:
        yield process


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Copy]:
    made = Copy(tmp_path / "copy")
    yield made
    shutil.rmtree(made.folder)


def test_there_are_mutants() -> None:
    names = {mutant.patch.stem for mutant in MUTANTS}
    assert {"evict-leased", "count-entries", "double-release"} <= names


def test_the_copy_has_every_named_test(zygote: Zygote, copy: Copy) -> None:
    """That the unchanged tests pass, the rest of the suite says."""
    code, said = copy.test(zygote, "--collect-only", *sorted({mutant.found_by for mutant in MUTANTS}))
    assert code == 0, said


def test_what_is_not_of_the_copy_is_noticed(zygote: Zygote, copy: Copy) -> None:
    shutil.rmtree(copy.folder / "server")
    (copy.folder / "server").symlink_to(ROOT / "server")
    code, said = copy.test(zygote, "tests/unit/test_tidy.py", "-p", "expertd_server", "--collect-only")
    assert code not in (0, 1) and f"not of the copy: ['{ROOT / 'server' / 'expertd_server'}" in said


def test_what_hangs_is_ended_and_shows_where(zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import threading\ndef test_it(): threading.Event().wait()\n")
    output = tmp_path / "output"
    outcome = zygote.run(Run(str(tmp_path), [], ["-s", "test_it.py"], dict(os.environ), str(output), limit_s=1))
    assert outcome.overdue and outcome.code == -signal.SIGABRT
    assert "Current thread" in output.read_text()


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.patch.stem for mutant in MUTANTS])
def test_the_mutant_is_found(mutant: Mutant, zygote: Zygote, copy: Copy) -> None:
    if mutant.shows_with is not None and not NEEDED[mutant.shows_with]():
        # Where rows of a product have the same bits in any batch, padding them or not is the same: nothing is wrong.
        pytest.skip(
            f"the bug changes no bit, and no test can find it, without {mutant.shows_with}: this processor has none"
        )
    copy.apply(mutant.patch)
    code, said = copy.test(zygote, mutant.found_by)
    assert code == 1, f"{mutant.patch.name} survived {mutant.found_by} (code {code}): {said[-4000:]}"
    errors = [line for line in said.splitlines() if line.startswith("E ")]
    meant = mutant.fails_with.split(" | ")
    assert any(text in line for line in errors for text in meant), "\n".join([mutant.fails_with, *errors[:40]])
