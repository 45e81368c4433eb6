"""Paged attention for the CPU behind transformers' `AttentionInterface`, the same bits for a token in any batch.

One form serves prefill and decode (law 7). Query positions fall into fixed tiles of `TILE_QUERIES`; a tile always
attends over keys padded to the same multiple of `KEY_STEP`, in one kernel call whose shape depends on the tile's
position alone: not on how the prompt was cut, on batch mates, or on how many of the tile's rows are real. Masked
softmax over shapes that follow the chunk boundaries gives other bits at most positions.

All query heads that share a key/value head are rows of one tile, so that keys are read once for the whole group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from expertd_engine.errors import ModelError
from expertd_engine.families import untold_window
from expertd_engine.model.kv_storage import KVStorage, LayerShape
from expertd_engine.model.step_rows import Span

ATTENTION_NAME = "expertd_paged"
TILE_QUERIES = 8
"""Measured on two cores, head size 64: prefill of 512 runs within 20 % of tiles of 32, one decode row costs half."""
KEY_STEP = 128
CALL_BYTES_MAX = 16 * 2**20
"""Keys and values gathered for one kernel call, and its mask, at most each (one tile may exceed it alone)."""
KEPT_MASK_KEYS_MAX = 4096
"""Masks over more keys than this are made anew for each layer: together they would outgrow the activations."""


@dataclass(frozen=True, slots=True)
class _Tile:
    row: int
    """Batch row of the tile's first real query."""
    first: int
    """Index of that query inside the tile."""
    count: int
    position: int
    """Position of the tile's row 0."""
    span: Span


class Attend(Protocol):
    """What attention does with one layer's rows; hangs on the forward call as `expertd_batch`."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """query `[T, kv_heads, group, key_dim]`, key and value `[T, kv_heads, dim]`, sinks `[kv_heads, group]` to
        `[T, kv_heads, group, value_dim]`."""
        ...


class ShapeRecorder:
    """Learns from one forward pass what each layer stores, whatever the family's configuration calls it."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        self.shapes[layer] = LayerShape(key.shape[1], query.shape[2], key.shape[2], value.shape[2])
        return query.new_zeros(*query.shape[:3], value.shape[2])

    def in_order(self) -> list[LayerShape]:
        """By layer index. Raises ModelError if some layer has no attention of ours."""
        missing = set(range(len(self.shapes))) - self.shapes.keys()
        if missing or not self.shapes:
            raise ModelError(f"attention layers {sorted(self.shapes)} were met: they must count from 0 without a gap")
        return [self.shapes[layer] for layer in range(len(self.shapes))]


class AttentionBatch:
    """One step's tokens, as attention sees them; built once a step and used by every layer."""

    def __init__(self, spans: Sequence[Span], storage: KVStorage) -> None:
        self.storage = storage
        self.num_rows = sum(span.length for span in spans)
        self._tiles = [tile for span in spans for tile in _tiles(span)]
        positions = [(span, p) for span in spans for p in range(span.start, span.start + span.length)]
        size = storage.block_tokens
        self._write_blocks = torch.tensor([span.blocks[p // size] for span, p in positions], dtype=torch.long)
        self._write_offsets = torch.tensor([p % size for _, p in positions], dtype=torch.long)
        self._calls: dict[int | None, list[_Call]] = {}

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store this step's keys and values, each `[rows, kv_heads, dim]`, in their blocks."""
        where = (self._write_blocks, self._write_offsets)
        self.storage.keys[layer].index_put_(where, keys)
        self.storage.values[layer].index_put_(where, values)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """See `Attend`. Rows beyond the batch's own (padding) come back as zeros."""
        self.write(layer, key[: self.num_rows], value[: self.num_rows])
        out = query.new_zeros(*query.shape[:3], value.shape[2])
        for call in self.calls(window):
            _attend(call, self.storage, layer, query, out, scale, sinks)
        return out

    def calls(self, window: int | None) -> list[_Call]:
        """The kernel calls for full attention (None) or a sliding window of that many tokens; the same every layer."""
        if window not in self._calls:
            self._calls[window] = _plan_calls(self._tiles, window, self.storage)
        return self._calls[window]


def _cut(tiles: list[_Tile], bytes_each: int) -> list[list[_Tile]]:
    width = max(1, CALL_BYTES_MAX // bytes_each)
    return [tiles[i : i + width] for i in range(0, len(tiles), width)]


class _Call:
    """Tiles that go through one kernel call: all over the same number of keys.

    They all share the same keys of one sequence, or each brings its own.
    """

    def __init__(self, tiles: Sequence[_Tile], window: int | None, block_tokens: int) -> None:
        self.num_tiles = len(tiles)
        ranges = [_key_range(tile, window) for tile in tiles]
        # With a window, tiles of one sequence may be over equally many keys that are not the same.
        keys_of = {(tile.span.row, *keys) for tile, keys in zip(tiles, ranges, strict=True)}
        sources = tiles[:1] if len(keys_of) == 1 else tiles
        self.num_keys = ranges[0][1] - ranges[0][0]
        tables: list[int] = []
        stale: list[int] = []
        for index, (tile, (first, end)) in enumerate(zip(sources, ranges, strict=False)):
            table = list(tile.span.blocks[first // block_tokens : end // block_tokens])
            tables += table + [0] * (self.num_keys // block_tokens - len(table))
            known = tile.span.start + tile.span.length - first
            stale += range(index * self.num_keys + known, index * self.num_keys + len(table) * block_tokens)
        self.tables = torch.tensor(tables, dtype=torch.long)
        """Blocks to gather, sequence after sequence, padded with the null block."""
        self.stale = torch.tensor(stale, dtype=torch.long)
        """Gathered keys that lie in a real block beyond the sequence's end: zeroed, since another sequence's
        infinities would pass through a masked product as NaN."""
        self.rows = torch.tensor([tile.row + i for tile in tiles for i in range(tile.count)], dtype=torch.long)
        """Batch rows of the real queries, and `places`, where they stand among all tiles' rows."""
        self.places = torch.tensor(
            [index * TILE_QUERIES + tile.first + i for index, tile in enumerate(tiles) for i in range(tile.count)],
            dtype=torch.long,
        )
        self._first_keys = torch.tensor([first for first, _ in ranges])[:, None]
        self._queries = torch.tensor([tile.position for tile in tiles])[:, None] + torch.arange(TILE_QUERIES)
        self._window = window
        self._masks: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def mask(self, heads: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask `[tiles, 1, TILE_QUERIES × heads, keys]`: 0 or -inf."""
        key = (heads, dtype)
        if key in self._masks:
            return self._masks[key]
        keys = self._first_keys + torch.arange(self.num_keys)
        hidden = keys[:, None, :] > self._queries[:, :, None]
        if self._window is not None:
            hidden |= keys[:, None, :] <= self._queries[:, :, None] - self._window
        hidden = hidden.repeat_interleave(heads, dim=1).unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        if self.num_keys <= KEPT_MASK_KEYS_MAX:
            self._masks[key] = mask
        return mask


def _tiles(span: Span) -> list[_Tile]:
    tiles = []
    position = span.start
    while position < span.start + span.length:
        base = position - position % TILE_QUERIES
        count = min(base + TILE_QUERIES, span.start + span.length) - position
        tiles.append(_Tile(span.row + position - span.start, position - base, count, base, span))
        position += count
    return tiles


def _key_range(tile: _Tile, window: int | None) -> tuple[int, int]:
    """First and end key of a tile's padded range: a function of its position alone."""
    end = -(-(tile.position + TILE_QUERIES) // KEY_STEP) * KEY_STEP
    first = 0 if window is None else max(0, tile.position - window + 1) // KEY_STEP * KEY_STEP
    return first, end


def _plan_calls(tiles: Sequence[_Tile], window: int | None, storage: KVStorage) -> list[_Call]:
    """Tiles of one sequence over the same keys share one gather; single tiles of several sequences share a call."""
    mask_row_bytes = TILE_QUERIES * storage.group_max * storage.dtype.itemsize
    by_sequence: dict[tuple[int, int, int], list[_Tile]] = defaultdict(list)
    for tile in tiles:
        by_sequence[(tile.span.row, *_key_range(tile, window))].append(tile)
    groups: list[list[_Tile]] = []
    singles: dict[int, list[_Tile]] = defaultdict(list)
    for (_, first, end), members in by_sequence.items():
        if len(members) > 1:
            groups += _cut(members, (end - first) * mask_row_bytes)
        else:
            singles[end - first].extend(members)
    for num_keys, members in singles.items():
        groups += _cut(members, num_keys * max(storage.token_bytes_max, mask_row_bytes))
    return [_Call(members, window, storage.block_tokens) for members in groups]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    expertd_batch: Attend,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query `[1, heads, T, key_dim]`, key and value `[1, kv_heads, T, dim]`.

    Returns `[1, T, heads, value_dim]`. `s_aux` `[heads]` are attention sinks: one more key of that score and no value.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every attention module of transformers has it
    out = expertd_batch.attend(
        layer,
        query[0].transpose(0, 1).unflatten(1, (kv_heads, heads // kv_heads)),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        untold_window(module.config, layer) if sliding_window is None else sliding_window,
        None if s_aux is None else s_aux.view(kv_heads, -1),
    )
    return out.flatten(1, 2).unsqueeze(0), None


def _attend(
    call: _Call, storage: KVStorage, layer: int, queries: torch.Tensor, out: torch.Tensor, scale: float,
    sinks: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fill `out` `[T, kv_heads, group, value_dim]` at the call's rows."""
    keys = _gather(storage.keys[layer], call)
    values = _gather(storage.values[layer], call)
    _, kv_heads, group, key_dim = queries.shape
    tiled = queries.new_zeros(call.num_tiles * TILE_QUERIES, kv_heads, group, key_dim)
    tiled.index_copy_(0, call.places, queries.index_select(0, call.rows))
    tiled = tiled.unflatten(0, (call.num_tiles, TILE_QUERIES))
    mask = call.mask(group, queries.dtype)
    mixed = torch.stack(
        [
            _kernel(
                tiled[:, :, head].flatten(1, 2), keys[:, :, head], values[:, :, head], mask, scale,
                None if sinks is None else sinks[head],
            ).unflatten(1, (TILE_QUERIES, group))
            for head in range(kv_heads)
        ],
        dim=2,
    ).flatten(0, 1)  # fmt: skip
    out.index_copy_(0, call.rows, mixed.index_select(0, call.places))


def _gather(pool: torch.Tensor, call: _Call) -> torch.Tensor:
    """Keys or values of the call, `[1 or tiles, keys, kv_heads, dim]`, zero where none exists."""
    gathered = pool.index_select(0, call.tables).flatten(0, 1)
    if len(call.stale):
        gathered.index_fill_(0, call.stale, 0)
    return gathered.view(-1, call.num_keys, *gathered.shape[1:])


def _kernel(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """One key/value head: query `[tiles, rows, key_dim]`, keys `[1 or tiles, keys, dim]` to `[tiles, rows, value_dim]`.

    A sink is one more key of zeros whose score stands in the mask and whose value is zero. The fused CPU kernel wants
    equal head sizes, so the smaller of key and value is padded with zeros. It gives each tile to one thread, but a
    tile that is alone to all threads, which split its products and so give other bits: that one runs twice.
    """
    value_dim = values.shape[-1]
    if sinks is not None:
        keys, values = pad(keys, (0, 0, 0, KEY_STEP)), pad(values, (0, 0, 0, KEY_STEP))
        score = mask.new_full((*mask.shape[:-1], KEY_STEP), -torch.inf)
        score[..., 0] = sinks.to(mask.dtype).repeat(TILE_QUERIES)
        mask = torch.cat((mask, score), dim=-1)
    width = max(query.shape[-1], value_dim)
    if query.shape[-1] != value_dim:
        query, keys, values = (pad(t, (0, width - t.shape[-1])) for t in (query, keys, values))
    num_tiles = len(query)
    tiles = max(num_tiles, 2 if torch.get_num_threads() > 1 else 1)
    query, mask = (t.expand(tiles, *t.shape[1:]) if num_tiles == 1 else t for t in (query, mask))
    keys, values = (t.unsqueeze(1).expand(tiles, -1, -1, -1) for t in (keys, values))
    mixed: torch.Tensor = scaled_dot_product_attention(query.unsqueeze(1), keys, values, attn_mask=mask, scale=scale)
    return mixed[:num_tiles, 0, :, :value_dim]
