"""Attention of a step's rows over keys and values in blocks, on the device.

Alone, a row is cut into at most 32 spans of keys, whose length and borders follow from its position; so its bits do not
depend on what else is in the step, and all processors take part in one long sequence. The last program of a row and key
head puts the spans together. In tiles, consecutive rows of one sequence share each key that is read: for prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SPANS = 32
"""Spans of keys that a row is cut into at most."""
MERGED_AT_ONCE = 8
QUERY_TILE = 16
"""Rows of a tile at most."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionScratch:
    """Room for what spans leave: `[rows, heads, SPANS]` and so on, all layers' alike."""

    sums: Tensor
    best: Tensor
    total: Tensor
    done: Tensor
    """int32 `[rows, kv_heads]`, zeros between launches."""

    @classmethod
    def of(
        cls, rows: int, heads: int, kv_heads: int, value_dim: int, device: torch.device | str
    ) -> AttentionScratch:
        """For steps of at most that many rows, and layers of at most that many heads and value dimensions."""
        return cls(
            torch.empty(rows * heads * SPANS * value_dim, device=device),
            torch.empty(rows * heads * SPANS, device=device),
            torch.empty(rows * heads * SPANS, device=device),
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
) -> None:
    """Attention of rows at `positions` `[R]` (negative: padding, gives zeros) over keys 0 to their own.

    query float32 `[R, heads * key_dim]`, scaled; keys `[blocks, block_tokens, kv_heads, key_dim]` float32 or bfloat16,
    values likewise; block p // block_tokens of row r is `tables[row_table[r]][p // block_tokens]` (int32). out float32
    `[R, heads * value_dim]`. A query sees its last `window` keys (0: all); `sinks` `[heads]` are scores of keys without
    a value; out is multiplied by sigmoid(gate), `[R, heads * value_dim]`. With `tiles` int32 `[T, 2]` (first row, how
    many up to QUERY_TILE; consecutive positions of one sequence) rows of a tile share what is read.
    """
    kv_heads, key_dim, value_dim = keys.shape[2], keys.shape[3], values.shape[3]
    group = query.shape[1] // (kv_heads * key_dim)
    shapes = {
        "GROUP": group,
        "KV_HEADS": kv_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_TOKENS": keys.shape[1],
        "WINDOW": window,
        "BLOCK_D": max(16, triton.next_power_of_2(key_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
    }
    given = (query, keys, values, tables, row_table, positions, sinks, gate, out)
    strides = (
        *(query.stride(0), *keys.stride()[:3], *values.stride()[:3], tables.stride(0)),
        *(0 if gate is None else gate.stride(0), out.stride(0)),
    )
    if tiles is None:
        _rows_kernel[(len(query), kv_heads, SPANS)](
            *given,
            *(scratch.sums, scratch.best, scratch.total, scratch.done),
            *strides,
            **shapes,
            GROUP_BLOCK=triton.next_power_of_2(group),
            MEMBERS=max(16, triton.next_power_of_2(group)),
            KEYS=64,
            SPANS=SPANS,
            MERGED=MERGED_AT_ONCE,
            num_warps=4,
            num_stages=2,
        )
    else:
        members = triton.next_power_of_2(group)
        _tiles_kernel[(len(tiles), kv_heads, triton.cdiv(QUERY_TILE, _tile_rows(members)))](
            *(*given, tiles),
            *strides,
            **shapes,
            MEMBERS=members,
            QUERIES=_tile_rows(members),
            KEYS=64 if keys.dtype == torch.bfloat16 else 32,
            num_warps=4,
            num_stages=2,
        )


def _tile_rows(members: int) -> int:
    """Rows of one program: a part of the tile, so that it has 16 to 128 queries."""
    return max(1, min(QUERY_TILE, 128 // members))


@triton.jit
def _keys_of(
    tables: tl.tensor, at: tl.tensor, end: tl.tensor, block_stride: tl.tensor, token_stride: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Where in a pool the keys of positions `at` begin; of those before `end`."""
    block = tl.load(tables + at // BLOCK_TOKENS, at < end, 0).to(tl.int64)
    return block * block_stride + (at % BLOCK_TOKENS) * token_stride


@triton.jit
def _over_keys(
    q: tl.tensor, best: tl.tensor, total: tl.tensor, sums: tl.tensor, position: tl.tensor,
    keys: tl.tensor, values: tl.tensor, tables: tl.tensor, begin: tl.tensor, end: tl.tensor,
    key_block: tl.tensor, key_token: tl.tensor, value_block: tl.tensor, value_token: tl.tensor,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The softmax so far of queries `q` `[M, D]` at `position` `[M]`, and keys from `begin` to before `end`."""
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    for first in range(begin, end, KEYS):
        at = first + tl.arange(0, KEYS)
        here = _keys_of(tables, at, end, key_block, key_token, BLOCK_TOKENS)
        key = tl.load(keys + here[:, None] + d[None, :], (at < end)[:, None] & (d < KEY_DIM)[None, :], 0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee")
        seen = at[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (at[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, -1e30)
        now = tl.maximum(best, tl.max(scores, 1))
        shares = tl.where(seen, tl.exp(scores - now[:, None]), 0.0)
        kept = tl.exp(best - now)
        total = total * kept + tl.sum(shares, 1)
        there = _keys_of(tables, at, end, value_block, value_token, BLOCK_TOKENS)
        value = tl.load(values + there[:, None] + e[None, :], (at < end)[:, None] & (e < VALUE_DIM)[None, :], 0.0)
        sums = tl.dot(shares.to(value.dtype), value, sums * kept[:, None], input_precision="ieee")
        best = now
    return best, total, sums


@triton.jit
def _leave(
    out: tl.tensor, gate: tl.tensor, sinks: tl.tensor, best: tl.tensor, total: tl.tensor, sums: tl.tensor,
    member: tl.tensor, lives: tl.tensor, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """Write queries' results `[M, V]`, where they live, to `out` `[M]`; `member` `[M]` are their heads' places."""
    if sinks is not None:
        sink = tl.load(sinks + member, lives, 0.0)
        now = tl.maximum(best, sink)
        kept = tl.exp(best - now)
        total = total * kept + tl.exp(sink - now)
        sums = sums * kept[:, None]
    e = tl.arange(0, BLOCK_V)[None, :]
    mask = lives[:, None] & (e < VALUE_DIM)
    result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    if gate is not None:
        result = result * tl.sigmoid(tl.load(gate[:, None] + e, mask, 0.0))
    tl.store(out[:, None] + e, result, mask)


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
    GROUP_BLOCK: tl.constexpr, MEMBERS: tl.constexpr, KEYS: tl.constexpr, SPANS: tl.constexpr, MERGED: tl.constexpr,
) -> None:  # fmt: skip
    row, head, span = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    known = tl.load(positions + row).to(tl.int32) + 1
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(known - WINDOW, 0) // KEYS * KEYS
    size = KEYS
    while size * SPANS < known - begin:
        size *= 2
    count = tl.cdiv(known - begin, size)
    m = tl.arange(0, MEMBERS)
    at_out = out + row * out_stride + (head * GROUP + m) * VALUE_DIM
    if (known <= 0) & (span == 0):
        e = tl.arange(0, BLOCK_V)[None, :]
        tl.store(at_out[:, None] + e, tl.zeros([MEMBERS, BLOCK_V], tl.float32), (m < GROUP)[:, None] & (e < VALUE_DIM))
    if (known > 0) & (span < count):
        first = begin + span * size
        d = tl.arange(0, BLOCK_D)[None, :]
        q = tl.load(
            query + row * query_stride + (head * GROUP + m)[:, None] * KEY_DIM + d,
            (m < GROUP)[:, None] & (d < KEY_DIM), 0.0,
        )  # fmt: skip
        best = tl.full([MEMBERS], -1e30, tl.float32)
        total = tl.zeros([MEMBERS], tl.float32)
        sums = tl.zeros([MEMBERS, BLOCK_V], tl.float32)
        best, total, sums = _over_keys(
            *(q.to(keys.dtype.element_ty), best, total, sums, tl.zeros([MEMBERS], tl.int32) + known - 1),
            *(keys + head * key_head, values + head * value_head),
            *(tables + tl.load(row_table + row).to(tl.int64) * table_stride, first, tl.minimum(first + size, known)),
            *(key_block, key_token, value_block, value_token),
            *(KEY_DIM, VALUE_DIM, BLOCK_TOKENS, WINDOW, BLOCK_D, BLOCK_V, KEYS),
        )
        at_gate = gate
        if gate is not None:
            at_gate = gate + row * gate_stride + (head * GROUP + m) * VALUE_DIM
        if count == 1:
            _leave(at_out, at_gate, sinks, best, total, sums, head * GROUP + m, m < GROUP, VALUE_DIM, BLOCK_V)
        else:
            place = row * KV_HEADS + head
            _keep_span(span_sums, span_best, span_total, best, total, sums, place * SPANS + span, GROUP, VALUE_DIM)
            tl.debug_barrier()  # all threads' spans are written before one of them says so
            if tl.atomic_add(done + place, 1, sem="acq_rel") == count - 1:
                tl.store(done + place, 0)
                g = tl.arange(0, GROUP_BLOCK)
