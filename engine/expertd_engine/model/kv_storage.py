"""Where keys and values lie: the bytes behind the KV pool's block numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from expertd_engine.experts.slab import PAGE, Slab


class LayerShape(NamedTuple):
    """What one attention layer stores for a token: `kv_heads` keys of `key_dim` and values of `value_dim`.

    `group` query heads share each of them.
    """

    kv_heads: int
    group: int
    key_dim: int
    value_dim: int


class KVStorage:
    """The bytes behind the KV pool's block numbers: `[block][layer]`, then keys `[kv_head][key_dim][token]` and values
    `[kv_head][token][value_dim]`.

    One block is contiguous over all layers, so that a block that is given up can return its pages. A head's keys lie
    transposed: scores of as many keys as a register holds are then one product after another, without sums over lanes.
    Block 0 is the null block: never written, all zeros; tables are padded with it.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        spare_blocks: int = 0,
    ) -> None:
        """`spare_blocks` more lie behind the `num_blocks`: what is written there is read by the same call alone."""
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self.dtype = dtype
        self.block_bytes = block_bytes(shapes, block_tokens, dtype)
        self.token_bytes_max = max(s.kv_heads * (s.key_dim + s.value_dim) for s in shapes) * dtype.itemsize
        """Bytes one token's keys and values take in the layer that stores most."""
        self.group_max = max(s.group for s in shapes)
        """Query heads to a key, in the layer with most."""
        self._slab = Slab(num_blocks + spare_blocks, self.block_bytes)
        self.address = self._slab.address
        """Of block 0."""
        self.keys: list[torch.Tensor] = []
        """Per layer, `[blocks, block_tokens, kv_heads, key_dim]`; `values` likewise."""
        self.values: list[torch.Tensor] = []
        self.offsets: list[tuple[int, int]] = []
        """Per layer, bytes from a block's beginning to its keys and to its values."""
        pool = torch.frombuffer(self._slab.whole, dtype=dtype).view(num_blocks + spare_blocks, -1)
        begin = 0
        for heads, _, key_dim, value_dim in shapes:
            middle = begin + block_tokens * heads * key_dim
            end = middle + block_tokens * heads * value_dim
            self.offsets.append((begin * dtype.itemsize, middle * dtype.itemsize))
            self.keys.append(pool[:, begin:middle].view(-1, heads, key_dim, block_tokens).permute(0, 3, 1, 2))
            self.values.append(pool[:, middle:end].view(-1, heads, block_tokens, value_dim).permute(0, 2, 1, 3))
            begin = end

    def provide(self, num_blocks: int) -> None:
        """Memory of blocks comes as they are written to."""

    def drop(self, block: int) -> None:
        """Return the block's memory to the system; its content is zeros from now on."""
        self._slab.drop(block)


def block_bytes(shapes: Sequence[LayerShape], block_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, rounded up to whole pages."""
    raw = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in shapes) * block_tokens * dtype.itemsize
    return -(-raw // PAGE) * PAGE
