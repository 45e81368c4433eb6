"""The prefix cache: KV blocks of earlier sequences, found again by those that begin with the same tokens. Pure.

A full block's key is a hash of its tokens and of the key before it, so it names a whole history; the chain begins at
what else decides KV: the store, the mode and the request's `cache_salt`. The pool keeps the blocks (see `kv_pool.py`).
Only blocks computed wholly in exact mode get a key.

Where numerics are invariant (law 7), what is found is bit-equal to what would have been computed, so the cache never
shows in an answer. Where they are per batch, it is what an equally good batch gave, and logits may differ in the last
bits. A router that carried state along the sequence would need that state kept beside the blocks: none here does.
"""

from __future__ import annotations

import hashlib
import json
from array import array

from expertd_engine.kv_pool import KVPool
from expertd_engine.request import Sequence


class PrefixCache:
    """Owned by the scheduler. `store_id` is the identity of the model's weights."""

    def __init__(self, pool: KVPool, store_id: str) -> None:
        self.num_queried = 0
        """Tokens of sequences that were admitted after a lookup, since start."""
        self.num_hit = 0
        """Of these, those found computed."""
        self._pool = pool
        self._store_id = store_id

    def lookup(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the KV of the sequence's first tokens, to be shared; its last token is never among them,
        because its logits are wanted. Empty for a sequence with prompt logprobs to come: it wants all logits."""
        blocks: list[int] = []
        if not self._may_find(sequence):
            return blocks
        for key in self._keys(sequence, (sequence.num_tokens - 1) // self._pool.block_tokens):
            block = self._pool.find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count(self, sequence: Sequence) -> None:
        """To be told of each sequence that was admitted with what `lookup` gave."""
        if self._may_find(sequence):
            self.num_queried += sequence.num_tokens
            self.num_hit += sequence.num_computed_tokens

    def publish(self, sequence: Sequence, start: int) -> None:
        """The blocks that became full since `start` tokens were computed can be found from now on."""
        if sequence.mode != "exact":
            return
        first, end = (tokens // self._pool.block_tokens for tokens in (start, sequence.num_computed_tokens))
        keys = self._keys(sequence, end)
        for index in range(first, end):
            self._pool.publish(sequence.block_table[index], keys[index])

    def _may_find(self, sequence: Sequence) -> bool:
        return sequence.mode == "exact" and not sequence.unscored(0, sequence.num_prompt_tokens)

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of the sequence's first `count` blocks, all of whose tokens are known."""
        keys, size = sequence.block_keys, self._pool.block_tokens
        for index in range(len(keys), count):
            parent = keys[-1] if keys else self._root(sequence)
            tokens = array("I", sequence.tokens(index * size, (index + 1) * size))
            keys.append(hashlib.sha256(parent + tokens.tobytes()).digest())
        return keys[:count]

    def _root(self, sequence: Sequence) -> bytes:
        what = json.dumps([self._store_id, sequence.mode, sequence.cache_salt])
        return hashlib.sha256(what.encode()).digest()
