"""The operator's side of the engine: live budget changes and the map of experts. One object for the server's life.

The engine answers `SetBudget`s in their order, so answers are matched by it. It draws maps only while somebody looks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from expertd_engine.messages import BudgetSet, ExpertMap, SetBudget, Watch
from expertd_server.engine_client import EngineClient
from expertd_server.errors import EngineDead

logger = logging.getLogger("expertd.console")

WATCH_S = 5.0
"""Seconds for which the engine draws maps after somebody looked."""


class Console:
    """Speaks to whichever engine process serves now."""

    def __init__(self, engine: EngineClient) -> None:
        self.experts: ExpertMap | None = None
        """The latest map, of an engine that still lives."""
        self._engine = engine
        self._experts_s = 0.0
        self._watched_s = float("-inf")
        self._in_force = SetBudget()
        """What was set since the server started."""
        self._changes: deque[SetBudget] = deque()
        """Sent and not answered, as `_asked`."""
        self._asked: deque[asyncio.Future[BudgetSet] | None] = deque()

    def map_age_s(self) -> float:
        """Seconds since the latest map came."""
        return time.monotonic() - self._experts_s

    def look(self) -> None:
        """Somebody looks at the map: have it drawn for a while."""
        now = time.monotonic()
        if now - self._watched_s > WATCH_S / 5 and self._engine.is_connected:
            self._watched_s = now
            self._engine.send(Watch(WATCH_S))

    async def set_budget(
        self, expert_budget_bytes: int | None = None, memory_budget_bytes: int | None = None
    ) -> BudgetSet:
        """The engine's answer; None leaves a budget as it is. Raises EngineDead where the engine ends instead."""
        if not self._engine.is_connected:
            raise EngineDead
        asked: asyncio.Future[BudgetSet] = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        change = SetBudget(expert_budget_bytes, memory_budget_bytes)
        self._changes.append(change)
        self._engine.send(change)
        return await asked

    # ------------------------------------------------------------ what the engine says

    def drew(self, experts: ExpertMap) -> None:
        """A map came."""
        self.experts, self._experts_s = experts, time.monotonic()

    def budget_set(self, answer: BudgetSet) -> None:
        """An answer came: to whoever asked first and has none."""
        logger.info("budget", extra={"fields": {"expert_budget_bytes": answer.expert_budget_bytes,
                                                "error": answer.error}})  # fmt: skip
        change = self._changes.popleft() if self._changes else None
        if answer.error is None and change is not None:
            self._in_force = _changed(self._in_force, change)
        asked = self._asked.popleft() if self._asked else None
        if asked is not None and not asked.done():
            asked.set_result(answer)

    def engine_ready(self) -> None:
        """A new engine serves, with the budget of the configuration: one that was set since holds on."""
        if self._in_force != SetBudget():
            self._asked.append(None)
            self._changes.append(self._in_force)
            self._engine.send(self._in_force)

    def engine_ended(self) -> None:
        """Nobody is left to answer."""
        self.experts, self._watched_s = None, float("-inf")
        self._changes.clear()
        while self._asked:
            asked = self._asked.popleft()
            if asked is not None and not asked.done():
                asked.set_exception(EngineDead())


def _changed(old: SetBudget, change: SetBudget) -> SetBudget:
    """`old` with what `change` sets."""
    experts, memory = change.expert_budget_bytes, change.memory_budget_bytes
    return SetBudget(
        old.expert_budget_bytes if experts is None else experts, old.memory_budget_bytes if memory is None else memory
    )
