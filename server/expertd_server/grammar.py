"""Whether a constraint can be kept: every grammar is compiled once here, before a request costs the engine anything.

The library bounds its own work, but not all of it: some grammars of a few kilobytes keep it busy for seconds or
exhaust its stack. So each one is compiled in a process of its own (`expertd_engine.grammar_check`), which is killed
when its time is over and may crash without harm. Verdicts are remembered: a grammar costs a process only once.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections import OrderedDict

import msgspec

from expertd_engine.messages import Constraint
from expertd_server.errors import InvalidRequest, clip

MAX_TEXT_BYTES = 64 * 2**10
CHECK_LIMIT_S = 3.0
"""From when the process starts: its own start is a tenth of a second, more on a busy box."""
MAX_VERDICTS = 512

_WORKER = (sys.executable, "-m", "expertd_engine.grammar_check")


class GrammarChecker:
    """Owned by the service."""

    def __init__(self, limit_s: float = CHECK_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._one_at_a_time = asyncio.Lock()
        """So that checks leave the streams their pace, and the memory that they count on."""
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        """By digest of the constraint, last use last: None, or what is wrong. Digests, because texts may be long."""

    async def check(self, constraint: Constraint, *, param: str) -> None:
        """Returns if the engine can hold an answer to `constraint`. Raises InvalidRequest naming `param` and what is
        wrong: a keyword of JSON schema that is not supported, a syntax error, or a grammar too large or too slow."""
        size = len(constraint.text.encode())
        if size > MAX_TEXT_BYTES:
            raise InvalidRequest(f"{param}: {size} bytes of grammar; at most {MAX_TEXT_BYTES} are allowed", param=param)
        key = hashlib.sha256(msgspec.msgpack.encode(constraint)).digest()
        if key not in self._verdicts:
            async with self._one_at_a_time:
                if key not in self._verdicts:  # as requests with one grammar often come together
                    self._remember(key, await self._verdict(constraint, param))
        self._verdicts.move_to_end(key)
        wrong = self._verdicts[key]
        if wrong is not None:
            raise InvalidRequest(f"{param}: {wrong}", param=param)

    def _remember(self, key: bytes, wrong: str | None) -> None:
        self._verdicts[key] = None if wrong is None else clip(wrong)
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)

    async def _verdict(self, constraint: Constraint, param: str) -> str | None:
        """What is wrong with it, if anything. Raises InvalidRequest where the process could not say."""
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
            raise InvalidRequest(
                f"{param}: the grammar takes longer than {self._limit_s:g} s to compile; use a simpler one", param=param
            ) from None
        finally:
            if process.returncode is None:  # our request may have been given up, too
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise InvalidRequest(
                f"{param}: the grammar is nested too deeply or too large to compile; use a simpler one", param=param
            )
        return msgspec.json.decode(output, type=str | None)
