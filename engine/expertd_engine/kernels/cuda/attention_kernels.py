"""The kernels of `attention`: programs of a row's span of keys, and of a tile of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_kernel(
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
def tiles_kernel(
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
