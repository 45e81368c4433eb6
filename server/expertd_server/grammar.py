"""Whether a constraint can be kept: every grammar is compiled once here, before a request costs the engine anything.

The library bounds its own work, but not all of it: some grammars of a few kilobytes keep it busy for seconds or
exhaust its stack. So each one is compiled in a process of its own (`expertd_engine.grammar_check`), which is killed
when its time is over and may crash without harm. Verdicts are remembered: a grammar costs a process only once. Other
grammars wait in a line of bounded length; requests that bring one grammar at once share its place there.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from expertd_engine.messages import Constraint
from expertd_server.errors import InvalidRequest, Unavailable, clip

MAX_TEXT_BYTES = 64 * 2**10
CHECK_LIMIT_S = 3.0
"""From when the process starts: its own start is a tenth of a second, more on a busy box."""
MAX_VERDICTS = 512
MAX_WAITING = 8
"""Grammars that may wait while one is checked: the last of them half a minute, if all are at their worst."""

_WORKER = (sys.executable, "-m", "expertd_engine.grammar_check")


class _Verdict(NamedTuple):
    wrong: str | None
    lasting: bool = True
    """False: of what ran out of time or memory, which it may have on another day."""


@dataclass(slots=True)
class _Check:
    """One grammar's place in the line."""

    task: asyncio.Task[_Verdict]
    asking: int = 0
    """Requests that wait for it."""


class GrammarChecker:
    """Owned by the service."""

    def __init__(self, limit_s: float = CHECK_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._one_at_a_time = asyncio.Lock()
        """So that checks leave the streams their pace, and the memory that they count on."""
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        """By digest of the constraint, last use last: None, or what is wrong. Digests, because texts may be long."""
        self._line: dict[bytes, _Check] = {}
        """By digest too: the check that runs, and those that wait."""

    async def check(self, constraint: Constraint, *, param: str) -> None:
        """Returns if the engine can hold an answer to `constraint`. Raises InvalidRequest naming `param` and what is
        wrong: a keyword of JSON schema that is not supported, a syntax error, or a grammar too large or too slow.
        Raises Unavailable where too many others wait."""
        size = len(constraint.text.encode())
        if size > MAX_TEXT_BYTES:
            raise InvalidRequest(f"{param}: {size} bytes of grammar; at most {MAX_TEXT_BYTES} are allowed", param=param)
        key = hashlib.sha256(msgspec.msgpack.encode(constraint)).digest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            wrong = self._verdicts[key]
        else:
            wrong = (await self._in_line(key, constraint)).wrong
        if wrong is not None:
            raise InvalidRequest(f"{param}: {wrong}", param=param)

    async def _in_line(self, key: bytes, constraint: Constraint) -> _Verdict:
        """The verdict on what has none. Its check ends early when nobody waits for it any more. Raises Unavailable."""
        check = self._line.get(key)
        if check is None:
            if len(self._line) > MAX_WAITING:
                raise Unavailable(
                    f"{MAX_WAITING} other grammars wait to be checked", retry_after_s=math.ceil(self._limit_s)
                )
            check = self._line[key] = _Check(asyncio.create_task(self._check(key, constraint)))
        check.asking += 1
        try:
            return await asyncio.shield(check.task)
        finally:
            check.asking -= 1
            if not check.asking:
                del self._line[key]
                check.task.cancel()
                await asyncio.gather(check.task, return_exceptions=True)

    async def _check(self, key: bytes, constraint: Constraint) -> _Verdict:
        async with self._one_at_a_time:
            verdict = await self._verdict(constraint)
        if verdict.lasting:
            self._verdicts[key] = verdict.wrong
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        return verdict

    async def _verdict(self, constraint: Constraint) -> _Verdict:
        process = await asyncio.create_subprocess_exec(
            *_WORKER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(self._limit_s):
                output, _ = await process.communicate(msgspec.json.encode(constraint))
        except TimeoutError:
            return _Verdict(
                f"the grammar takes longer than {self._limit_s:g} s to compile; use a simpler one", lasting=False
            )
        finally:
            if process.returncode is None:  # the check may have been given up, too
                process.kill()
                await process.wait()
        if process.returncode != 0:
            return _Verdict(
                "the grammar is nested too deeply or too large to compile; use a simpler one", lasting=False
            )
        wrong = msgspec.json.decode(output, type=str | None)
        return _Verdict(None if wrong is None else clip(wrong))
