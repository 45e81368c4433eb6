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
import triton.language as tl
from torch import Tensor

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
        _tiles_kernel[(len(tiles), keys.shape[2], triton.cdiv(QUERY_TILE, queries))](
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
    _rows_kernel[(len(query), keys.shape[2], config.spans)](
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


@triton.jit
def _rows_kernel(
    query: tl.tensor, keys: tl.tensor, values: tl.tensor, tables: tl.tensor, row_table: tl.tensor,
    positions: tl.tensor, sinks: tl.tensor, gate: tl.tensor, out: tl.tensor,
    span_sums: tl.tensor, span_best: tl.tensor, span_total: tl.tensor, done: tl.tensor,
    query_stride: tl.tensor, key_block: tl.tensor, key_token: tl.tensor, key_head: tl.tensor,
    value_block: tl.tensor, value_token: tl.tensor, value_head: tl.tensor, table_stride: tl.tensor,
    gate_stride: tl.tensor, out_stride: tl.tensor,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, MEMBERS: tl.constexpr, KEYS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr,
    MERGED: tl.constexpr,
) -> None:  # fmt: skip
    row, head, span = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    known = tl.load(positions + row).to(tl.int32) + 1
    sequence = tl.load(row_table + row).to(tl.int64)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(known - WINDOW, 0) // KEYS * KEYS
    size = SPAN
    while size * SPANS < known - begin:
        size *= 2
    count = tl.maximum(tl.cdiv(known - begin, size), 1)  # a row of padding has one span, of no keys
    if span < count:
        m = head * GROUP + tl.arange(0, MEMBERS)
        g = head * GROUP + tl.arange(0, GROUP_BLOCK)
        end = (head + 1) * GROUP
        first = begin + span * size
        table = tables + sequence * table_stride
        q = _queries(query + row * query_stride + m * KEY_DIM, m < end, keys, KEY_DIM, BLOCK_D)
        best, total, sums = _over_keys(
            q, known - 1 + tl.zeros([MEMBERS], tl.int32), keys + head * key_head, values + head * value_head, table,
            first, tl.minimum(first + size, known), key_block, key_token, value_block, value_token,
            KEY_DIM, VALUE_DIM, BLOCK_TOKENS, WINDOW, BLOCK_V, KEYS,
        )  # fmt: skip
        to = row * out_stride
        by = row * gate_stride
        place = row * KV_HEADS + head
        if count == 1:
            _leave(out, gate, sinks, best, total, sums, m, to, by, m < end, VALUE_DIM, BLOCK_V)
        else:
            mine = place * SPANS * GROUP
            at = span * GROUP + tl.arange(0, MEMBERS)
            _keep_span(
                span_sums + mine * VALUE_DIM, span_best + mine, span_total + mine, best, total, sums, at, m < end,
                VALUE_DIM, BLOCK_V,
            )  # fmt: skip
            tl.debug_barrier()  # all threads have written before one says so
            if tl.atomic_add(done + place, 1, sem="acq_rel") == count - 1:
                tl.store(done + place, 0)
                whole_best, whole_total, whole_sums = _merged(
                    span_sums + mine * VALUE_DIM, span_best + mine, span_total + mine, count,
                    GROUP, VALUE_DIM, BLOCK_V, GROUP_BLOCK, MERGED,
                )  # fmt: skip
                _leave(out, gate, sinks, whole_best, whole_total, whole_sums, g, to, by, g < end, VALUE_DIM, BLOCK_V)


@triton.jit
def _tiles_kernel(
    query: tl.tensor, keys: tl.tensor, values: tl.tensor, tables: tl.tensor, row_table: tl.tensor,
    positions: tl.tensor, sinks: tl.tensor, gate: tl.tensor, out: tl.tensor, tiles: tl.tensor,
    query_stride: tl.tensor, key_block: tl.tensor, key_token: tl.tensor, key_head: tl.tensor,
    value_block: tl.tensor, value_token: tl.tensor, value_head: tl.tensor, table_stride: tl.tensor,
    gate_stride: tl.tensor, out_stride: tl.tensor,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    MEMBERS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
) -> None:  # fmt: skip
    tile, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(tiles + 2 * tile).to(tl.int64) + part * QUERIES
    count = tl.minimum(tl.load(tiles + 2 * tile + 1) - part * QUERIES, QUERIES)
    if count > 0:
        m = tl.arange(0, QUERIES * MEMBERS)
        row, member = m // MEMBERS, m % MEMBERS
        lives = (row < count) & (member < GROUP)
        place = head * GROUP + member
        start = tl.load(positions + first).to(tl.int32)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(start + 1 - WINDOW, 0) // KEYS * KEYS
        table = tables + tl.load(row_table + first).to(tl.int64) * table_stride
        q = _queries(query + (first + row) * query_stride + place * KEY_DIM, lives, keys, KEY_DIM, BLOCK_D)
        best, total, sums = _over_keys(
            q, start + row, keys + head * key_head, values + head * value_head, table,
            begin, start + count, key_block, key_token, value_block, value_token,
            KEY_DIM, VALUE_DIM, BLOCK_TOKENS, WINDOW, BLOCK_V, KEYS,
        )  # fmt: skip
        to = (first + row) * out_stride
        by = (first + row) * gate_stride
        _leave(out, gate, sinks, best, total, sums, place, to, by, lives, VALUE_DIM, BLOCK_V)


@triton.jit
def _queries(
    begin: tl.tensor, lives: tl.tensor, keys: tl.tensor, KEY_DIM: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """Queries `[M, D]` that begin at `begin` `[M]`, as numbers of the keys' type."""
    d = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(begin[:, None] + d, lives[:, None] & (d < KEY_DIM), 0.0).to(keys.dtype.element_ty)


@triton.jit
def _over_keys(
    q: tl.tensor, position: tl.tensor, keys: tl.tensor, values: tl.tensor, table: tl.tensor, begin: tl.tensor,
    end: tl.tensor, key_block: tl.tensor, key_token: tl.tensor, value_block: tl.tensor, value_token: tl.tensor,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_V: tl.constexpr, KEYS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Queries `q` `[M, D]` at `position` `[M]` over keys from `begin` to before `end`: each one's best score, the sum
    of what its keys count relative to that, and the sum of so many values."""
    d = tl.arange(0, q.shape[1])[None, :]
    e = tl.arange(0, BLOCK_V)[None, :]
    best = tl.full([q.shape[0]], -1e30, tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    sums = tl.zeros([q.shape[0], BLOCK_V], tl.float32)
    ahead = begin + tl.arange(0, KEYS)
    following = tl.load(table + ahead // BLOCK_TOKENS, ahead < end, 0)
    for first in range(begin, end, KEYS):
        at = first + tl.arange(0, KEYS)
        block = following.to(tl.int64)
        ahead = at + KEYS
        following = tl.load(table + ahead // BLOCK_TOKENS, ahead < end, 0)  # asked for before it is needed
        inside = at % BLOCK_TOKENS
        here = keys + block * key_block + inside * key_token
        there = values + block * value_block + inside * value_token
        key = tl.load(here[:, None] + d, (at < end)[:, None] & (d < KEY_DIM), 0.0)
        value = tl.load(there[:, None] + e, (at < end)[:, None] & (e < VALUE_DIM), 0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee")
        seen = at[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (at[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, -1e30)
        now = tl.maximum(best, tl.max(scores, 1))
        shares = tl.where(seen, tl.exp(scores - now[:, None]), 0.0)
        kept = tl.exp(best - now)
        sums = tl.dot(shares.to(value.dtype), value, sums * kept[:, None], input_precision="ieee")
        total = total * kept + tl.sum(shares, 1)
        best = now
    return best, total, sums


@triton.jit
def _keep_span(
    span_sums: tl.tensor, span_best: tl.tensor, span_total: tl.tensor, best: tl.tensor, total: tl.tensor,
    sums: tl.tensor, at: tl.tensor, lives: tl.tensor, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    e = tl.arange(0, BLOCK_V)[None, :]
    tl.store(span_best + at, best, lives)
    tl.store(span_total + at, total, lives)
    tl.store(span_sums + at[:, None] * VALUE_DIM + e, sums, lives[:, None] & (e < VALUE_DIM))


@triton.jit
def _merged(
    span_sums: tl.tensor, span_best: tl.tensor, span_total: tl.tensor, count: tl.tensor,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """As `_over_keys`, from `count` spans that other programs kept."""
    g = tl.arange(0, GROUP_BLOCK)[None, :]
    e = tl.arange(0, BLOCK_V)[None, None, :]
    best = tl.full([GROUP_BLOCK], -1e30, tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    sums = tl.zeros([GROUP_BLOCK, BLOCK_V], tl.float32)
    for first in range(0, count, MERGED):
        span = first + tl.arange(0, MERGED)[:, None]
        at = span * GROUP + g
        mask = (span < count) & (g < GROUP)
        theirs = tl.load(span_best + at, mask, -1e30, cache_modifier=".cg")
        now = tl.maximum(best, tl.max(theirs, 0))
        share = tl.exp(theirs - now[None, :])
        kept = tl.exp(best - now)
        part = tl.load(
            span_sums + at[:, :, None] * VALUE_DIM + e, mask[:, :, None] & (e < VALUE_DIM), 0.0, cache_modifier=".cg"
        )
        sums = sums * kept[:, None] + tl.sum(part * share[:, :, None], 0)
        total = total * kept + tl.sum(tl.load(span_total + at, mask, 0.0, cache_modifier=".cg") * share, 0)
        best = now
    return best, total, sums


@triton.jit
def _leave(
    out: tl.tensor, gate: tl.tensor, sinks: tl.tensor, best: tl.tensor, total: tl.tensor, sums: tl.tensor,
    head: tl.tensor, row_out: tl.tensor, row_gate: tl.tensor, lives: tl.tensor, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """Write results `[M, V]` of heads `head` `[M]`, where they live, to rows that begin at `row_out` (one or `[M]`)."""
    if sinks is not None:
        sink = tl.load(sinks + head, lives, 0.0)
        now = tl.maximum(best, sink)
        kept = tl.exp(best - now)
        total = total * kept + tl.exp(sink - now)
        sums = sums * kept[:, None]
    to = (row_out + head * VALUE_DIM)[:, None] + tl.arange(0, BLOCK_V)[None, :]
    mask = lives[:, None] & (tl.arange(0, BLOCK_V) < VALUE_DIM)[None, :]
    result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    if gate is not None:
        by = (row_gate + head * VALUE_DIM)[:, None] + tl.arange(0, BLOCK_V)[None, :]
        result = result * tl.sigmoid(tl.load(gate + by, mask, 0.0))
    tl.store(out + to, result, mask)
