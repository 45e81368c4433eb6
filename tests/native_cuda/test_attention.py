"""Attention on the device against float64: rows alone, in tiles, with windows, sinks and gates."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from expertd_engine.kernels.cuda.attention import QUERY_TILE, AttentionScratch, attend
from golden.tolerances import DEVICE_ATTENTION
from support.interpreter import DEVICE

BLOCK_TOKENS, BLOCKS, SEQUENCES, TABLE = 16, 40, 3, 180


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0
    sinks: bool = False
    gate: bool = False


SHAPES = [Shape(4, 2, 16, 16), Shape(6, 2, 24, 16, 70, True, True), Shape(2, 2, 8, 8, 0, True), Shape(3, 1, 16, 40, 5)]
CASES = [(SHAPES[1], torch.bfloat16), *((shape, torch.float32) for shape in SHAPES)]


class World:
    """Random keys and values of a few sequences."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.keys = torch.randn(BLOCKS, BLOCK_TOKENS, shape.kv_heads, shape.key_dim).to(dtype)
        self.values = torch.randn(BLOCKS, BLOCK_TOKENS, shape.kv_heads, shape.value_dim).to(dtype)
        self.tables = torch.randint(0, BLOCKS, (SEQUENCES, TABLE), dtype=torch.int32)
        self.sinks = torch.randn(shape.heads) if shape.sinks else None

    def queries(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Queries and gates of `count` rows."""
        gate = torch.randn(count, self.shape.heads * self.shape.value_dim) if self.shape.gate else None
        return torch.randn(count, self.shape.heads * self.shape.key_dim) / self.shape.key_dim**0.5, gate

    def attend(
        self, query: Tensor, gate: Tensor | None, positions: Tensor, tables: Tensor, tiles: Tensor | None = None
    ) -> Tensor:
        """By the kernels, twice: what a launch leaves behind must not matter to the next."""
        shape = self.shape
        out = torch.full((len(query), shape.heads * shape.value_dim), 7.0, device=DEVICE)
        scratch = AttentionScratch.of(len(query), shape.heads, shape.kv_heads, shape.value_dim, DEVICE)
        q, keys, values, all_tables, table, places = (
            t.to(DEVICE) for t in (query, self.keys, self.values, self.tables, tables, positions)
        )
        sinks, by, cut = (None if t is None else t.to(DEVICE) for t in (self.sinks, gate, tiles))
        for _ in range(2):
            attend(
                *(q, keys, values, all_tables, table, places, out, scratch),
                window=shape.window,
                sinks=sinks,
                gate=by,
                tiles=cut,
            )
        return out.cpu()

    def expected(self, query: Tensor, gate: Tensor | None, positions: Tensor, tables: Tensor) -> Tensor:
        shape = self.shape
        out = torch.zeros(len(query), shape.heads, shape.value_dim, dtype=torch.double)
        for row, position in enumerate(positions.tolist()):
            if position >= 0:
                out[row] = self._row(query[row], position, self.tables[tables[row]])
        flat = out.flatten(1)
        return flat if gate is None else flat * gate.double().sigmoid()

    def _row(self, query: Tensor, position: int, table: Tensor) -> Tensor:
        shape = self.shape
        at = torch.arange(max(0, position + 1 - shape.window) if shape.window else 0, position + 1)
        blocks, inside = table[at // BLOCK_TOKENS].long(), at % BLOCK_TOKENS
        group = shape.heads // shape.kv_heads
        keys = self.keys[blocks, inside].double().repeat_interleave(group, 1)
        values = self.values[blocks, inside].double().repeat_interleave(group, 1)
        scores = torch.einsum("hd,thd->ht", query.double().view(shape.heads, -1), keys)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.double()[:, None]], 1)
        return torch.einsum("ht,thd->hd", scores.softmax(1)[:, : len(at)], values)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_rows_of_any_length(shape: Shape, dtype: torch.dtype) -> None:
    world = World(shape, dtype)
    query, gate = world.queries(4)
    positions, tables = torch.tensor([5, -1, 170, 2500]), int32([0, 0, 1, 2])
    error = world.attend(query, gate, positions, tables) - world.expected(query, gate, positions, tables)
    assert error.abs().max() <= DEVICE_ATTENTION[dtype].allowed


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_rows_of_a_prompt_in_tiles(shape: Shape, dtype: torch.dtype) -> None:
    world = World(shape, dtype)
    query, gate = world.queries(30)
    positions = torch.cat([torch.arange(160, 181), torch.arange(9)])
    tables = int32([1] * 21 + [2] * 9)
    tiles = int32([0, QUERY_TILE, QUERY_TILE, 5, 21, 9]).view(-1, 2)
    error = world.attend(query, gate, positions, tables, tiles) - world.expected(query, gate, positions, tables)
    assert error.abs().max() <= DEVICE_ATTENTION[dtype].allowed


def test_a_rows_bits_follow_from_its_own_sequence() -> None:
    world = World(SHAPES[1], torch.bfloat16)
    query, gate = world.queries(4)
    positions, tables = torch.tensor([5, 170, 900, 63]), int32([0, 1, 2, 1])
    together = world.attend(query, gate, positions, tables)
    for row in range(4):
        own = slice(row, row + 1)
        alone = world.attend(query[own], None if gate is None else gate[own], positions[own], tables[own])
        assert torch.equal(alone, together[own])
