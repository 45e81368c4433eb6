"""One process under measurement, seen from outside: started, asked, and, where its memory is limited, perhaps lost."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from expertd_engine.bench.cgroup import inside, limited_memory, num_kills
from expertd_engine.bench.protocol import Answer, EngineSpec, PeerSpec, Request
from expertd_engine.errors import EngineError
from expertd_engine.memory import MemoryCgroup

T = TypeVar("T")


class Lost(EngineError):
    """The process will not answer: it was killed, or took too long. The message is fit for a table."""


class Contender:
    """A worker process. A context manager: the process ends with the block."""

    def __init__(
        self, specification: EngineSpec | PeerSpec, *, limit_bytes: int | None = None, timeout_s: float
    ) -> None:
        """`limit_bytes`: run in a memory cgroup of this size. `timeout_s`: how long one answer may take."""
        self._specification = specification
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
        self._stack = ExitStack()
        self._group: MemoryCgroup | None = None
        self._figures: tuple[int, int] | None = None
        """Kills and peak of a cgroup that is no more."""
        self._received = b""

    def __enter__(self) -> Self:
        """Starts it and waits until it is ready. Raises Lost, EngineError, ResourceError."""
        command = [
            sys.executable,
            "-m",
            "expertd_engine.bench.worker",
            msgspec.json.encode(self._specification).decode(),
        ]
        try:
            if self._limit_bytes is not None:
                self._group = self._stack.enter_context(limited_memory(self._limit_bytes))
                self._stack.callback(self._keep_figures)
                command = inside(self._group, command)
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(self._specification)
            )
            self._stack.callback(self._end)
            self._answer(f"did not start in {self._timeout_s:.0f} s")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def ask(self, request: Request, kind: type[T]) -> T:
        """Its answer. Raises Lost, or EngineError with what went wrong there."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Lost(self._story()) from None
        return msgspec.convert(self._answer(f"no answer in {self._timeout_s:.0f} s").result, kind)

    @property
    def kills(self) -> int | None:
        """Processes that the kernel killed in the cgroup; None without one."""
        return None if self._group is None else self._cgroup_figures(self._group)[0]

    @property
    def cgroup_peak_bytes(self) -> int | None:
        """The most that the cgroup was ever charged, page cache included; None without one."""
        return None if self._group is None else self._cgroup_figures(self._group)[1]

    def _cgroup_figures(self, group: MemoryCgroup) -> tuple[int, int]:
        return self._figures or (num_kills(group), group.peak_bytes())

    def _keep_figures(self) -> None:
        """Those who did not get ready in time are asked about as well."""
        assert self._group is not None
        self._figures = self._cgroup_figures(self._group)

    def _answer(self, too_late: str) -> Answer:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        until_s = time.monotonic() + self._timeout_s
        while b"\n" not in self._received:
            ready, _, _ = select.select([fd], [], [], max(0.0, until_s - time.monotonic()))
            if not ready:
                self._process.kill()  # or it would go on, and disturb the others
                raise Lost(too_late)
            data = os.read(fd, 1 << 16)
            if not data:
                raise Lost(self._story())
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.error is not None:
            raise EngineError(answer.error)
        return answer

    def _story(self) -> str:
        code = self._process.wait()
        if self.kills:
            return "killed for want of memory"
        return f"ended with code {code}"

    def _end(self) -> None:
        """Kill it if it still runs: nothing of a measurement needs to be put in order."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _environment(specification: EngineSpec | PeerSpec) -> dict[str, str]:
    """Ours. A peer does without what is set for OpenMP in our favour: it names its threads itself."""
    if isinstance(specification, EngineSpec):
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
