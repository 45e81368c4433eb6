"""The KV pool: which blocks of the KV cache are in use, and by how many. Owns ids and counts, never memory.

Used by the scheduler alone. Block 0 is the null block: zeros, never handed out, what attention pads tables with.
A block in use may be published: its content, final from then on, is known by a key. When nobody uses it any more it
is cached: still found by its key, still counted as free, and given up, least recently used first, once no other block
is left. Law: blank, cached and used blocks are disjoint and together are all blocks below the limit, plus the retired
ones in use.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from expertd_engine.errors import EngineError

NULL_BLOCK = 0


class KVPool:
    """Blocks 1 to `num_blocks - 1`, each room for the keys and values of `block_tokens` tokens in every layer."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        """`num_blocks` counts the null block. Raises ValueError where not one block could be allocated."""
        if block_tokens < 1:
            raise ValueError(f"block_tokens is {block_tokens}: it must be at least 1")
        self.block_tokens = block_tokens
        self.num_evictions = 0
        """Cached blocks given up, since start."""
        self._references: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """By last use, oldest first."""
        self._keys: dict[int, bytes] = {}
        """Of all published blocks, used or cached; `_published` is the inverse."""
        self._published: dict[bytes, int] = {}
        self.resize(num_blocks)

    def resize(self, num_blocks: int) -> None:
        """Set the limit, live. Blocks in use at or above it are retired: freed, they are not handed out again. Their
        keys are forgotten, so that nobody new comes to share them.

        Lowest ids are handed out first, so that a pool that is not full can shrink without waiting.
        """
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}: it must be at least 2, the null block and one to use")
        self.num_blocks = num_blocks
        for block in [block for block in self._keys if block >= num_blocks]:
            self._forget(block)
        kept = self._references.keys() | self._cached.keys()
        self._blank = [block for block in range(NULL_BLOCK + 1, num_blocks) if block not in kept]

    @property
    def capacity(self) -> int:
        """Blocks that can be in use at once, once retired ones have gone."""
        return self.num_blocks - 1

    @property
    def free_blocks(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def cached_blocks(self) -> int:
        return len(self._cached)

    @property
    def used_blocks(self) -> int:
        """Blocks in use, retired ones included."""
        return len(self._references)

    @property
    def references(self) -> Mapping[int, int]:
        """How often each block in use is held: a view."""
        return MappingProxyType(self._references)

    def blocks_for(self, num_tokens: int) -> int:
        """How many hold so many tokens."""
        return -(-num_tokens // self.block_tokens)

    def can_allocate(self, count: int, *, besides: Collection[int] = ()) -> bool:
        """Whether `count` blocks could be allocated once the blocks `besides` have been shared."""
        return count <= self.free_blocks - sum(block in self._cached for block in besides)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of undefined content, one reference each. Ask `can_allocate` first."""
        if not 0 <= count <= self.free_blocks:
            raise EngineError(f"KV pool: {count} blocks asked for, {self.free_blocks} free")
        blocks = [self._take_free() for _ in range(count)]
        self._references.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each block, used or cached; each must be freed once more."""
        for block in blocks:
            if block in self._cached:
                del self._cached[block]
                self._references[block] = 0
            self._require_used(block, "share")
            self._references[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """From now on the content of a block in use stays as it is, and `find` gives it for `key`.

        Void where another block is known by that key, and for a retired block.
        """
        self._require_used(block, "publish")
        if block in self._keys:
            raise EngineError(f"KV pool: cannot publish block {block}: it is published")
        if block < self.num_blocks and key not in self._published:
            self._keys[block] = key
            self._published[key] = block

    def find(self, key: bytes) -> int | None:
        """The block published by `key`, used or cached: `share` it before anything else is allocated."""
        return self._published.get(key)

    def is_published(self, block: int) -> bool:
        """Whether nobody may write to the block."""
        return block in self._keys

    def free(self, blocks: Iterable[int]) -> None:
        """Give back one reference to each block. One that is not in use is an error, not a no-op.

        Of those that come to be cached, the first is given up first.
        """
        for block in blocks:
            self._require_used(block, "free")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._unused(block)

    def check(self) -> None:
        """Raise EngineError unless the conservation law holds. Linear in the number of blocks."""
        blank, cached, used = set(self._blank), set(self._cached), set(self._references)
        expected = set(range(NULL_BLOCK + 1, self.num_blocks)) | {block for block in used if block >= self.num_blocks}
        if len(self._blank) + len(cached) + len(used) != len(expected) or blank | cached | used != expected:
            raise EngineError(
                f"KV pool: {len(self._blank)} blank, {len(cached)} cached and {len(used)} used blocks are not "
                f"{len(expected)}"
            )
        if self._published != {key: block for block, key in self._keys.items()} or not cached <= self._keys.keys():
            raise EngineError("KV pool: keys and blocks do not match")
        if blank & self._keys.keys():
            raise EngineError(f"KV pool: blank blocks with a key: {blank & self._keys.keys()}")
        if min(self._references.values(), default=1) < 1:
            raise EngineError(f"KV pool: blocks in use without a reference: {self._references}")

    def _take_free(self) -> int:
        if self._blank:
            return heapq.heappop(self._blank)
        oldest = next(iter(self._cached))
        self._forget(oldest)
        return oldest

    def _forget(self, block: int) -> None:
        del self._published[self._keys.pop(block)]
        if block in self._cached:
            del self._cached[block]
            self.num_evictions += 1

    def _unused(self, block: int) -> None:
        """Nobody holds it any more: it is cached, blank or, if it was retired, gone."""
        del self._references[block]
        if block in self._keys:
            self._cached[block] = None
        elif block < self.num_blocks:
            heapq.heappush(self._blank, block)

    def _require_used(self, block: int, what: str) -> None:
        if block not in self._references:
            raise EngineError(f"KV pool: cannot {what} block {block}: it is not in use")
