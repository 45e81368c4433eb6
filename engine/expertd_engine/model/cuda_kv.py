"""The bytes of keys and values on a device, whose memory goes back to the system when the pool above it shrinks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expertd_engine.experts.device_streams import Device
from expertd_engine.model.kv_storage import LayerShape


class DeviceKV:
    """Blocks one after the other, each with all layers' keys, then values. Block 0 is the null block.

    Addresses stay what they are, as captured graphs need it; memory is there for all blocks at first.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], num_blocks: int, block_tokens: int, dtype: torch.dtype, device: Device
    ) -> None:
        """Raises ResourceError."""
        self.shapes, self.num_blocks, self.block_tokens = shapes, num_blocks, block_tokens
        sizes = [block_tokens * s.kv_heads * width for s in shapes for width in (s.key_dim, s.value_dim)]
        self.block_bytes = sum(sizes) * dtype.itemsize
        self._range = device.reserve(num_blocks * self.block_bytes)
        self.fallback = self._range.fallback
        """Why a pool that shrinks returns nothing; None where it does."""
        pool = self._range.whole[: num_blocks * self.block_bytes].view(dtype).view(num_blocks, -1)
        parts = pool.split(sizes, dim=1)
        heads = [shape.kv_heads for shape in shapes]
        self.keys = [part.unflatten(1, (block_tokens, n, -1)) for part, n in zip(parts[::2], heads, strict=True)]
        """Per layer, `[blocks, block_tokens, kv_heads, key_dim]`; `values` likewise."""
        self.values = [part.unflatten(1, (block_tokens, n, -1)) for part, n in zip(parts[1::2], heads, strict=True)]
        self._is_there = [True] * num_blocks
        self._backed = [True] * (self._pieces(num_blocks - 1).stop)

    def drop(self, block: int) -> None:
        """The block is no one's, and will not be before it is provided: return what memory it alone still held."""
        if self._is_there[block]:
            self._is_there[block] = False
            for piece in self._pieces(block):
                if self._backed[piece] and not self._holds(piece):
                    self._backed[piece] = False
                    self._range.release(piece)

    def provide(self, num_blocks: int) -> None:
        """Have memory for the first `num_blocks` blocks. Raises ResourceError; what was provided before it stays."""
        for block in range(num_blocks):
            for piece in () if self._is_there[block] else self._pieces(block):
                if not self._backed[piece]:
                    self._range.back(piece)
                    self._backed[piece] = True
            self._is_there[block] = True

    def free(self) -> None:
        """Give everything back. No launched work may reach it, and nobody reads it again."""
        self._range.free()

    def _pieces(self, block: int) -> range:
        """Of the range, that the block lies in."""
        granule, begin = self._range.granule, block * self.block_bytes
        return range(begin // granule, (begin + self.block_bytes - 1) // granule + 1)

    def _holds(self, piece: int) -> bool:
        """Whether any block that is there lies in the piece."""
        begin, granule = piece * self._range.granule, self._range.granule
        last = min(self.num_blocks - 1, (begin + granule - 1) // self.block_bytes)
        return any(self._is_there[begin // self.block_bytes : last + 1])
