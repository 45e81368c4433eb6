"""A process that has imported everything heavy of others, and forks one child for each run of pytest.

Runs as a program: one request a line in, one outcome a line out. Nothing of ours is imported here but by the children,
each from the folders it is told, so that two children can test two versions of the tree.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from types import TracebackType
from typing import Any

HEAVY = (
    *("pytest", "hypothesis.stateful", "numpy", "torch", "torch.utils._pytree", "sympy", "triton", "safetensors.torch"),
    *("accelerate", "gguf", "huggingface_hub", "llguidance", "msgspec", "prometheus_client", "tokenizers", "yaml"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mixtral", "qwen2_moe")),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
)
GRACE_S = 20  # for writing the stacks


@dataclass(frozen=True)
class Run:
    """`python -m pytest *arguments` in `folder`, with `paths` before all others and output appended to `output`."""

    folder: str
    paths: list[str]
    arguments: list[str]
    environment: dict[str, str]
    output: str
    limit_s: int = 300  # a slow box may stall for minutes; only what hangs takes this long


@dataclass(frozen=True)
class Outcome:
    """The exit code, or minus the signal that ended it; whether it was ended for taking too long."""

    code: int
    overdue: bool


class Zygote:
    """The process as its user sees it. Entering waits for its imports."""

    def __enter__(self) -> Zygote:
        command = [sys.executable, "-P", __file__]  # -P: this folder is not on its path
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # or numpy starts threads, which no fork survives
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._answer() == {"ready": True}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._process.communicate()

    def run(self, run: Run) -> Outcome:
        """Raises AssertionError if the process is gone."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(run)) + "\n")
        self._process.stdin.flush()
        return Outcome(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote is gone"
        answer: dict[str, Any] = json.loads(line)
        return answer


def _imported() -> None:
    """What is not installed is not imported: the tests that need it skip."""
    for name in HEAVY:
        if importlib.util.find_spec(name.split(".")[0]) is not None:
            importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads run; only one would be left after a fork"


def _become(run: Run) -> int:
    """What the child does; the exit code."""
    os.setsid()
    output = os.open(run.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()  # until pytest does
    os.chdir(run.folder)
    os.environ.clear()
    os.environ.update(run.environment)
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in os.environ
    sys.path[:0] = run.paths
    import pytest

    # Pytest would have rewritten the assertions of its plugins.
    return int(pytest.main(["-W", "ignore::pytest.PytestAssertRewriteWarning", *run.arguments]))


def _child(act: Callable[[], int]) -> None:
    """Ends the process without a word to what the parent has open."""
    code = 70
    try:
        code = act()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, limit_s: int) -> Outcome:
    """Past the limit the handler of SIGABRT writes all stacks; in the end nothing of its session is left."""
    means = [signal.SIGABRT, signal.SIGKILL]

    def overdue(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, means.pop(0))
        signal.alarm(GRACE_S)

    signal.signal(signal.SIGALRM, overdue)
    signal.alarm(limit_s)
    _, status = os.waitpid(pid, 0)
    signal.alarm(0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return Outcome(os.waitstatus_to_exitcode(status), len(means) < 2)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed by others
    _imported()
    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        run = Run(**json.loads(line))
        pid = os.fork()
        if pid == 0:
            _child(partial(_become, run))
        print(json.dumps(asdict(_wait(pid, run.limit_s))), file=answers)
    os._exit(0)  # libraries of others complain where they are torn down


if __name__ == "__main__":
    main()
