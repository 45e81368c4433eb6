"""The KV pool: which blocks of the KV cache are in use, and by how many. Owns ids and counts, never memory.

Used by the scheduler alone. Block 0 is the null block: zeros, never handed out, what attention pads tables with.
Law: free and used blocks are disjoint and together are all blocks below the limit, plus the retired ones in use.

A prefix cache fits between `free` and the free list: a block whose count falls to zero but whose content is known by
hash would wait in a least-recently-used order, still counted as free; `allocate` would take from there once the free
list is empty, and a hit would `share` it out again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from expertd_engine.errors import EngineError

NULL_BLOCK = 0


class KVPool:
    """Blocks 1 to `num_blocks - 1`, each room for the keys and values of `block_tokens` tokens in every layer."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        """`num_blocks` counts the null block. Raises ValueError where not one block could be allocated."""
        if block_tokens < 1:
            raise ValueError(f"block_tokens is {block_tokens}: it must be at least 1")
        self.block_tokens = block_tokens
        self._references: dict[int, int] = {}
        self.resize(num_blocks)

    def resize(self, num_blocks: int) -> None:
        """Set the limit, live. Blocks in use at or above it are retired: freed, they are not handed out again.

        Lowest ids are handed out first, so that a pool that is not full can shrink without waiting.
        """
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}: it must be at least 2, the null block and one to use")
        self.num_blocks = num_blocks
        self._free = [block for block in range(NULL_BLOCK + 1, num_blocks) if block not in self._references]

    @property
    def capacity(self) -> int:
        """Blocks that can be in use at once, once retired ones have gone."""
        return self.num_blocks - 1

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        """Blocks in use, retired ones included."""
        return len(self._references)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of undefined content, one reference each. Ask `can_allocate` first."""
        if not 0 <= count <= len(self._free):
            raise EngineError(f"KV pool: {count} blocks asked for, {len(self._free)} free")
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        self._references.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each block; each must be freed once more."""
        for block in blocks:
            self._require_used(block, "share")
            self._references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Give back one reference to each block. One that is not in use is an error, not a no-op."""
        for block in blocks:
            self._require_used(block, "free")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._retire(block)

    def check(self) -> None:
        """Raise EngineError unless the conservation law holds. Linear in the number of blocks."""
        free, used = set(self._free), set(self._references)
        expected = set(range(NULL_BLOCK + 1, self.num_blocks)) | {block for block in used if block >= self.num_blocks}
        if len(free) != len(self._free) or free & used or free | used != expected:
            raise EngineError(f"KV pool: {len(self._free)} free and {len(used)} used blocks are not {len(expected)}")
        if min(self._references.values(), default=1) < 1:
            raise EngineError(f"KV pool: blocks in use without a reference: {self._references}")

    def _retire(self, block: int) -> None:
        del self._references[block]
        if block < self.num_blocks:
            heapq.heappush(self._free, block)

    def _require_used(self, block: int, what: str) -> None:
        if block not in self._references:
            raise EngineError(f"KV pool: cannot {what} block {block}: it is not in use")
