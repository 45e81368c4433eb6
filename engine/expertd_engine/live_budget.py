"""The budgets of an engine that serves: takes changes, divides them, sees that memory stays inside. Owns targets."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from expertd_engine.config import Size
from expertd_engine.errors import ResourceError
from expertd_engine.memory import MemoryUse
from expertd_engine.messages import BudgetSet, SetBudget
from expertd_engine.planning.guard import ExpertBudget, guarded_expert_budget
from expertd_engine.planning.live import divide
from expertd_engine.planning.pressure import PressureControl
from expertd_engine.pressure import PressureReader
from expertd_engine.startup import Engine

if TYPE_CHECKING:
    from expertd_engine.device_startup import DeviceEngine

logger = logging.getLogger(__name__)


class LiveBudget:
    """Called between steps."""

    def __init__(self, engine: Engine | DeviceEngine, pressure: PressureReader | None = None) -> None:
        """With `pressure`, experts give way to a box that is short of memory."""
        self.memory_budget_bytes = engine.info.memory_budget_bytes
        """None: there is none."""
        self.shrinks = 0
        """Times that memory was found above its budget and the expert budget was lowered by the excess."""
        self.control = PressureControl()
        self._pressure = pressure
        self._engine = engine
        self._asked = engine.asked
        self._planned_experts = engine.cache.ledger.budget_bytes
        self._planned_blocks = engine.pool.capacity
        self._touched_blocks = engine.pool.num_blocks
        """Nothing was ever written from this block on, or it has been given back."""

    def set(self, message: SetBudget) -> BudgetSet:
        """Change a budget, or say why not; then nothing has changed."""
        error, ledger = None, self._engine.cache.ledger
        self._engine.runner.settle()
        try:
            if message.memory_budget_bytes is not None:
                self._set_memory(message.memory_budget_bytes, message.expert_budget_bytes)
            elif message.expert_budget_bytes is not None:
                self._set_experts(message.expert_budget_bytes)
        except ResourceError as refusal:
            error = str(refusal)
        return BudgetSet(ledger.budget_bytes, ledger.limit_bytes, error, self.memory_budget_bytes)

    def tick(self, memory: MemoryUse) -> None:
        """Once in a while: give back KV that has become idle, and what memory is above its budget."""
        pool = self._engine.pool
        self._engine.runner.settle()
        if self.memory_budget_bytes is not None and pool.capacity > self._planned_blocks:
            self._set_memory(self.memory_budget_bytes, None)
        self._drop_blocks()
        self._guard(memory, self._ceiling())

    def _set_experts(self, budget_bytes: int) -> None:
        most = self._engine.info.expert_bytes_total
        if self.memory_budget_bytes is not None:
            free = replace(self._asked, expert_budget=None)
            most = divide(
                self._engine.measured, free, self.memory_budget_bytes,
                needed_blocks=self._needed_blocks(), most_blocks=self._engine.storage.num_blocks - 1,
            ).expert_budget_bytes  # fmt: skip
        if budget_bytes > most:
            raise ResourceError(f"expert budget of {budget_bytes} bytes is too large: at most {most} bytes")
        self._engine.cache.set_budget(budget_bytes)
        self._asked = replace(self._asked, expert_budget=Size(bytes=budget_bytes))
        self._planned_experts = budget_bytes

    def _set_memory(self, memory_bytes: int, expert_bytes: int | None) -> None:
        asked = self._asked if expert_bytes is None else replace(self._asked, expert_budget=Size(bytes=expert_bytes))
        engine = self._engine
        part = divide(
            engine.measured, asked, memory_bytes,
            needed_blocks=self._needed_blocks(), most_blocks=engine.storage.num_blocks - 1,
        )  # fmt: skip
        before, blocks = engine.pool.num_blocks, part.kv_blocks + 1
        engine.core.scheduler.resize_pool(min(blocks, before))
        self._drop_blocks()  # whoever shrinks makes room for the other first
        try:
            engine.cache.set_budget(part.expert_budget_bytes)
            engine.storage.provide(blocks)
        except ResourceError:
            engine.storage.provide(before)
            engine.core.scheduler.resize_pool(before)
            raise
        engine.core.scheduler.resize_pool(blocks)
        self._touched_blocks = max(self._touched_blocks, blocks)
        self._asked, self.memory_budget_bytes = asked, memory_bytes
        self._planned_experts, self._planned_blocks = part.expert_budget_bytes, part.wanted_kv_blocks

    def _needed_blocks(self) -> int:
        """What live sequences hold, and the most that any of them may come to need."""
        return max(self._engine.pool.used_blocks, self._engine.core.scheduler.needed_blocks)

    def _drop_blocks(self) -> None:
        """Return the memory of blocks beyond the pool's limit that nobody holds any more."""
        pool, storage = self._engine.pool, self._engine.storage
        beyond = range(pool.num_blocks, self._touched_blocks)
        held = [block for block in beyond if block in pool.references]
        for block in beyond:
            if block not in pool.references:
                storage.drop(block)
        self._touched_blocks = max([pool.num_blocks, *(block + 1 for block in held)])

    def _ceiling(self) -> int:
        """What is planned for experts, less what they lend to a box short of memory."""
        ledger, before = self._engine.cache.ledger, self.control.shrinks
        if self._pressure is None:
            return self._planned_experts
        ceiling = self.control.ceiling(
            self._pressure.read(), self._planned_experts, ledger.minimum_bytes, ledger.resident_bytes
        )
        if self.control.shrinks > before:
            logger.warning("the box is short of memory: experts get %d bytes for now", ceiling)
        return ceiling

    def _guard(self, memory: MemoryUse, planned: int) -> None:
        ledger, budget = self._engine.cache.ledger, self.memory_budget_bytes
        now = min(ledger.budget_bytes, planned)
        experts = ExpertBudget(now, ledger.resident_bytes + ledger.loading_bytes, ledger.minimum_bytes, planned)
        guarded = planned if budget is None else guarded_expert_budget(memory.used_bytes, budget, experts)
        if guarded < now:
            logger.warning(
                "memory of %d bytes is above its budget of %d: experts get %d", memory.used_bytes, budget, guarded
            )
            self.shrinks += 1
        if guarded != ledger.budget_bytes:
            self._set_guarded(guarded)

    def _set_guarded(self, budget_bytes: int) -> None:
        try:
            self._engine.cache.set_budget(budget_bytes)
        except ResourceError as refusal:  # others have taken what experts once had of a card
            self._planned_experts = self._engine.cache.ledger.budget_bytes
            logger.warning("experts stay at %d bytes: %s", self._planned_experts, refusal)
