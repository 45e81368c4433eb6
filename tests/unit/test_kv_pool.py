from __future__ import annotations

import pytest

from expertd_engine.errors import EngineError
from expertd_engine.kv_pool import NULL_BLOCK, KVPool


def test_hands_out_every_block_but_the_null_block() -> None:
    pool = KVPool(num_blocks=5, block_tokens=16)
    assert pool.capacity == 4
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert NULL_BLOCK == 0
    assert not pool.can_allocate(1)
    assert (pool.free_blocks, pool.used_blocks) == (0, 4)
    pool.check()


def test_allocating_more_than_is_free_is_an_error_and_takes_nothing() -> None:
    pool = KVPool(num_blocks=3, block_tokens=16)
    with pytest.raises(EngineError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)
    assert pool.free_blocks == 2


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert KVPool(2, 16).blocks_for(tokens) == blocks


def test_double_free_is_an_error() -> None:
    pool = KVPool(4, 16)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(EngineError, match="cannot free block 1: it is not in use"):
        pool.free(blocks)


def test_sharing_what_is_not_in_use_is_an_error() -> None:
    with pytest.raises(EngineError, match="cannot share block 3"):
        KVPool(4, 16).share([3])


def test_a_shared_block_is_free_after_its_last_holder() -> None:
    pool = KVPool(4, 16)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    pool.free(blocks)
    assert pool.used_blocks == 1
    pool.free(blocks[:1])
    assert pool.used_blocks == 0
    pool.check()


def test_shrinking_retires_blocks_when_they_are_freed() -> None:
    pool = KVPool(6, 16)
    blocks = pool.allocate(5)
    pool.resize(3)
    assert (pool.capacity, pool.free_blocks, pool.used_blocks) == (2, 0, 5)
    pool.free(blocks)
    pool.check()
    assert sorted(pool.allocate(2)) == [1, 2]
    assert not pool.can_allocate(1)


def test_growing_again_does_not_hand_out_a_block_still_in_use() -> None:
    pool = KVPool(4, 16)
    pool.allocate(3)
    pool.resize(2)
    pool.resize(6)
    assert pool.allocate(2) == [4, 5]
    pool.check()


@pytest.mark.parametrize("num_blocks", [-1, 0, 1])
def test_a_pool_without_a_usable_block_is_refused(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}: it must be at least 2"):
        KVPool(num_blocks, 16)


def test_blocks_of_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="block_tokens is 0"):
        KVPool(4, 0)


def test_check_notices_a_lost_block() -> None:
    pool = KVPool(4, 16)
    pool._blank.pop()
    with pytest.raises(EngineError, match="2 blank, 0 cached and 0 used blocks are not 3"):
        pool.check()


def cached(pool: KVPool, *keys: bytes) -> list[int]:
    """Blocks published by `keys` and given back, in this order."""
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    pool.free(blocks)
    return blocks


def test_a_published_block_is_found_after_its_last_holder_and_counts_as_free() -> None:
    pool = KVPool(4, 16)
    (block,) = cached(pool, b"a")
    assert (pool.free_blocks, pool.cached_blocks, pool.used_blocks) == (3, 1, 0)
    assert pool.find(b"a") == block
    pool.share([block])
    assert (pool.free_blocks, pool.cached_blocks, pool.used_blocks) == (2, 0, 1)
    pool.free([block])
    pool.check()


def test_cached_blocks_are_given_up_only_when_no_other_is_left_least_recently_used_first() -> None:
    pool = KVPool(5, 16)
    a, b, c = cached(pool, b"a", b"b", b"c")
    pool.share([a])
    pool.free([a])
    assert pool.allocate(1) == [4]
    assert pool.num_evictions == 0
    assert pool.allocate(2) == [b, c]
    assert pool.num_evictions == 2
    assert [pool.find(key) for key in (b"a", b"b", b"c")] == [a, None, None]
    pool.check()


def test_blocks_about_to_be_shared_are_not_there_to_be_allocated() -> None:
    pool = KVPool(4, 16)
    a, b = cached(pool, b"a", b"b")
    assert pool.can_allocate(3)
    assert pool.can_allocate(1, besides=[a, b])
    assert not pool.can_allocate(2, besides=[a, b])


def test_of_two_blocks_with_one_content_the_first_is_found_and_the_second_is_blank_when_freed() -> None:
    pool = KVPool(4, 16)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    pool.free([first, second])
    assert (pool.find(b"a"), pool.cached_blocks) == (first, 1)
    pool.check()


@pytest.mark.parametrize("publish_first", [True, False])
def test_only_a_used_block_can_be_published_and_only_once(publish_first: bool) -> None:
    pool = KVPool(4, 16)
    blocks = pool.allocate(1)
    if publish_first:
        pool.publish(blocks[0], b"a")
    else:
        pool.free(blocks)
    with pytest.raises(EngineError, match="cannot publish block 1"):
        pool.publish(blocks[0], b"b")


def test_shrinking_gives_up_cached_blocks_above_and_forgets_retired_ones() -> None:
    pool = KVPool(6, 16)
    blocks = pool.allocate(5)
    for block in blocks:
        pool.publish(block, bytes([block]))
    pool.free([2, 4])
    pool.resize(4)
    assert [block for block in blocks if pool.find(bytes([block]))] == [1, 2, 3]
    assert (pool.free_blocks, pool.cached_blocks, pool.num_evictions) == (1, 1, 1)
    pool.free([1, 3, 5])
    assert (pool.free_blocks, pool.cached_blocks, pool.used_blocks) == (3, 3, 0)
    pool.check()
