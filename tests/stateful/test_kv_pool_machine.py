"""The KV pool against a twin of dicts, under any order of calls."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expertd_engine.errors import EngineError
from expertd_engine.kv_pool import NULL_BLOCK, KVPool


class KVPoolMachine(RuleBasedStateMachine):
    """`holders` maps a block to how often it is held; `limit` counts the null block. `content` maps a key to its block,
    `cached` holds the ones of those that nobody holds, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 6
        self.pool = KVPool(self.limit, block_tokens=16)
        self.holders: dict[int, int] = {}
        self.content: dict[int, int] = {}
        self.cached: list[int] = []

    def free_twin(self) -> set[int]:
        return set(range(1, self.limit)) - set(self.holders)

    def pick(self, data: st.DataObject, among: Collection[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(among)), min_size=1, max_size=4, unique=True))

    def forget(self, blocks: Collection[int]) -> None:
        self.content = {key: block for key, block in self.content.items() if block not in blocks}
        self.cached = [block for block in self.cached if block not in blocks]

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        self.allocate_blocks(count)

    def allocate_blocks(self, count: int) -> None:
        free = self.free_twin()
        assert self.pool.can_allocate(count) == (count <= len(free))
        if count > len(free):
            with pytest.raises(EngineError):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert set(blocks) <= free
        given_up = max(0, count - (len(free) - len(self.cached)))
        assert set(blocks) & set(self.cached) == set(self.cached[:given_up])
        self.forget(self.cached[:given_up])
        self.holders |= dict.fromkeys(blocks, 1)

    @precondition(lambda self: self.cached)
    @rule()
    def allocate_all(self) -> None:
        """Rare by chance, and what a cache must stand."""
        self.allocate_blocks(len(self.free_twin()))

    @precondition(lambda self: self.holders or self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = self.pick(data, {*self.holders, *self.cached})
        left = len(self.free_twin()) - len(set(blocks) & set(self.cached))
        assert self.pool.can_allocate(left, besides=blocks) and not self.pool.can_allocate(left + 1, besides=blocks)
        self.pool.share(blocks)
        for block in blocks:
            self.holders[block] = self.holders.get(block, 0) + 1
        self.cached = [block for block in self.cached if block not in blocks]

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = self.pick(data, self.holders)
        self.pool.free(blocks)
        for block in blocks:
            self.holders[block] -= 1
            if not self.holders[block]:
                del self.holders[block]
                self.cached += [block] if block in self.content.values() else []

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), key=st.integers(0, 5))
    def publish(self, data: st.DataObject, key: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.holders)))
        if block in self.content.values():
            with pytest.raises(EngineError):
                self.pool.publish(block, bytes([key]))
            return
        self.pool.publish(block, bytes([key]))
        if block < self.limit:
            self.content.setdefault(key, block)

    @rule(block=st.integers(NULL_BLOCK, 9))
    def free_what_is_not_held(self, block: int) -> None:
        if block in self.holders:
            return
        with pytest.raises(EngineError):
            self.pool.free([block])
        with pytest.raises(EngineError):
            self.pool.publish(block, b"")
        if block not in self.cached:
            with pytest.raises(EngineError):
                self.pool.share([block])

    @rule(limit=st.integers(2, 9))
    def resize(self, limit: int) -> None:
        self.pool.resize(limit)
        self.limit = limit
        self.forget([block for block in self.content.values() if block >= limit])

    @invariant()
    def counts_agree_and_law_holds(self) -> None:
        assert self.pool.free_blocks == len(self.free_twin())
        assert self.pool.references == self.holders
        assert self.pool.cached_blocks == len(self.cached)
        assert [self.pool.find(bytes([key])) for key in range(6)] == [self.content.get(key) for key in range(6)]
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
