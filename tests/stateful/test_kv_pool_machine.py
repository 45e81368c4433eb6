"""The KV pool against a twin of a dict and a set, under any order of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expertd_engine.errors import EngineError
from expertd_engine.kv_pool import NULL_BLOCK, KVPool


class KVPoolMachine(RuleBasedStateMachine):
    """`holders` maps a block to how often it is held; `limit` counts the null block."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 6
        self.pool = KVPool(self.limit, block_tokens=16)
        self.holders: dict[int, int] = {}

    def free_twin(self) -> set[int]:
        return set(range(1, self.limit)) - set(self.holders)

    def pick(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.holders)), min_size=1, max_size=4, unique=True))

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        free = self.free_twin()
        assert self.pool.can_allocate(count) == (count <= len(free))
        if count > len(free):
            with pytest.raises(EngineError):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert set(blocks) <= free
        self.holders |= dict.fromkeys(blocks, 1)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = self.pick(data)
        self.pool.share(blocks)
        for block in blocks:
            self.holders[block] += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = self.pick(data)
        self.pool.free(blocks)
        for block in blocks:
            self.holders[block] -= 1
            if not self.holders[block]:
                del self.holders[block]

    @rule(block=st.integers(NULL_BLOCK, 9))
    def free_what_is_not_held(self, block: int) -> None:
        if block in self.holders:
            return
        with pytest.raises(EngineError):
            self.pool.free([block])
        with pytest.raises(EngineError):
            self.pool.share([block])

    @rule(limit=st.integers(2, 9))
    def resize(self, limit: int) -> None:
        self.pool.resize(limit)
        self.limit = limit

    @invariant()
    def counts_agree_and_law_holds(self) -> None:
        assert self.pool.free_blocks == len(self.free_twin())
        assert self.pool.used_blocks == len(self.holders)
        self.pool.check()

    def teardown(self) -> None:
        """Whatever happened, everything can be given back, and then everything below the limit is free."""
        for block, count in self.holders.items():
            for _ in range(count):
                self.pool.free([block])
        self.pool.check()
        assert (self.pool.used_blocks, self.pool.free_blocks) == (0, self.limit - 1)


TestKVPool = KVPoolMachine.TestCase
TestKVPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
