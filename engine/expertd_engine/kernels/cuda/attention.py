"""Attention of a step's rows over keys and values in blocks, on the device.

Alone, a row is cut into spans of keys, whose length and borders follow from its position; so its bits do not
depend on what else is in the step, and all processors take part in one long sequence. The last program of a row and key
head puts the spans together. In tiles, consecutive rows of one sequence share each key that is read: for prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from expertd_engine.kernels.cuda.attention_kernels import rows_kernel, tiles_kernel

SPANS_MAX = 32
"""Spans of keys that a row is cut into at most."""
QUERY_TILE = 16
"""Rows of a tile at most."""


class RowsConfig(NamedTuple):
    """How a row alone is cut: keys at once, keys of the smallest span, spans, spans put together at once, warps."""

    keys: int
    span: int
    spans: int
    merged: int
    warps: int


FASTEST = RowsConfig(64, 128, 16, 16, 8)
"""What was fastest on an H100."""
EXACT = RowsConfig(16, 128, 16, 4, 4)
"""For keys in float32, whose products need more registers."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionScratch:
    """Room for what spans leave: `[rows, heads, SPANS_MAX]` and so on, all layers' alike."""

    sums: Tensor
    best: Tensor
    total: Tensor
    done: Tensor
    """int32 `[rows, kv_heads]`, zeros between launches."""

    @classmethod
    def of(cls, rows: int, heads: int, kv_heads: int, value_dim: int, device: torch.device | str) -> AttentionScratch:
        """For steps of at most that many rows, and layers of at most that many heads and value dimensions."""
        return cls(
            torch.empty(rows * heads * SPANS_MAX * value_dim, device=device),
            torch.empty(rows * heads * SPANS_MAX, device=device),
            torch.empty(rows * heads * SPANS_MAX, device=device),
            torch.zeros(rows * kv_heads, dtype=torch.int32, device=device),
        )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    row_table: Tensor,
    positions: Tensor,
    out: Tensor,
    scratch: AttentionScratch,
    *,
    window: int = 0,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    tiles: Tensor | None = None,
    config: RowsConfig | None = None,
) -> None:
    """Attention of rows at `positions` `[R]` (negative: padding, gives zeros) over keys 0 to their own.

    query float32 `[R, heads * key_dim]`, scaled; keys `[blocks, block_tokens, kv_heads, key_dim]` float32 or bfloat16,
    values likewise; block p // block_tokens of row r is `tables[row_table[r]][p // block_tokens]` (int32). out float32
    `[R, heads * value_dim]`. A query sees its last `window` keys (0: all); `sinks` `[heads]` are scores of keys without
    a value; out is multiplied by sigmoid(gate), `[R, heads * value_dim]`. With `tiles` int32 `[T, 2]` (first row, how
    many up to QUERY_TILE; consecutive positions of one sequence) rows of a tile share what is read.
    """
    shapes = _shapes(query, keys, values, window)
    given = (query, keys, values, tables, row_table, positions, sinks, gate, out)
    strides = (
        *(query.stride(0), *keys.stride()[:3], *values.stride()[:3], tables.stride(0)),
        *(0 if gate is None else gate.stride(0), out.stride(0)),
    )
    members = triton.next_power_of_2(shapes["GROUP"])
    if tiles is not None:
        queries = _queries_together(members, keys.dtype)
        tiles_kernel[(len(tiles), keys.shape[2], triton.cdiv(QUERY_TILE, queries))](
            *(*given, tiles, *strides),
            **shapes,
            MEMBERS=members,
            QUERIES=queries,
            KEYS=64 if keys.dtype == torch.bfloat16 else 16,
            num_warps=8 if members * queries > 64 else 4,
            num_stages=2,
        )
        return
    config = config or (FASTEST if keys.dtype == torch.bfloat16 else EXACT)
    rows_kernel[(len(query), keys.shape[2], config.spans)](
        *(*given, scratch.sums, scratch.best, scratch.total, scratch.done, *strides),
        **shapes,
        GROUP_BLOCK=members,
        MEMBERS=max(16, members),
        KEYS=config.keys,
        SPANS=config.spans,
        SPAN=config.span,
        MERGED=config.merged,
        num_warps=config.warps,
    )


def _shapes(query: Tensor, keys: Tensor, values: Tensor, window: int) -> dict[str, int]:
    kv_heads, key_dim, value_dim = keys.shape[2], keys.shape[3], values.shape[3]
    return {
        "GROUP": query.shape[1] // (kv_heads * key_dim),
        "KV_HEADS": kv_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_TOKENS": keys.shape[1],
        "WINDOW": window,
        "BLOCK_D": max(16, triton.next_power_of_2(key_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
    }


def _queries_together(members: int, dtype: torch.dtype) -> int:
    """Rows of a tile that one program takes, so that it has 16 to 128 queries; float32 needs more registers."""
    return max(1, 16 // members, min(QUERY_TILE, (128 if dtype == torch.bfloat16 else 32) // members))
