"""Paged attention against a plain float64 reference, and the same bits for a token however its sequence is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from expertd_engine.errors import ModelError
from expertd_engine.model.attention import KEY_STEP, TILE_QUERIES, AttentionBatch, ShapeRecorder
from expertd_engine.model.kv_storage import KVStorage, LayerShape, block_bytes
from expertd_engine.model.step_rows import Span

BLOCK = 16
SCALE = 0.17
NUM_BLOCKS = 64


@dataclass(frozen=True)
class Case:
    shape: LayerShape
    window: int | None = None
    sinks: bool = False


CASES = {
    "gqa": Case(LayerShape(3, 3, 64, 64)),
    "mla": Case(LayerShape(4, 1, 24, 20)),
    "wide-values": Case(LayerShape(1, 4, 16, 40)),
    "window": Case(LayerShape(2, 2, 32, 32), window=37),
    "window-of-a-key-step": Case(LayerShape(2, 2, 32, 32), window=KEY_STEP),
    "window-of-one": Case(LayerShape(1, 2, 32, 32), window=1),
    "sinks": Case(LayerShape(2, 4, 32, 32), sinks=True),
    "sinks-window": Case(LayerShape(2, 4, 32, 32), window=20, sinks=True),
}
DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Tokens:
    """One sequence's queries `[T, kv_heads, group, key_dim]`, keys and values `[T, kv_heads, dim]`, and the sinks."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sinks: torch.Tensor | None


def make_tokens(case: Case, length: int, dtype: torch.dtype, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    heads, group, key_dim, value_dim = case.shape
    query = torch.randn(length, heads, group, key_dim, generator=generator).to(dtype)
    key = torch.randn(length, heads, key_dim, generator=generator).to(dtype)
    value = torch.randn(length, heads, value_dim, generator=generator).to(dtype)
    sinks = torch.randn(heads, group, generator=torch.Generator().manual_seed(9)).to(dtype) if case.sinks else None
    return Tokens(query, key, value, sinks)


def reference(tokens: Tokens, window: int | None) -> torch.Tensor:
    """Attention in float64, `[T, kv_heads, group, value_dim]`."""
    query, key, value = (t.double() for t in (tokens.query, tokens.key, tokens.value))
    scores = torch.einsum("qhgd,khd->hgqk", query, key) * SCALE
    index = torch.arange(len(query))
    hidden = index[None, :] > index[:, None]
    if window is not None:
        hidden |= index[None, :] <= index[:, None] - window
    scores = scores.masked_fill(hidden, -torch.inf)
    if tokens.sinks is not None:
        sink = tokens.sinks.double()[:, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1)[..., : len(query)]
    return torch.einsum("hgqk,khd->qhgd", weights, value)


class Running:
    """A sequence in a storage, computed piece by piece."""

    def __init__(self, tokens: Tokens, blocks: Sequence[int]) -> None:
        self.tokens = tokens
        self.blocks = list(blocks)
        self.computed = 0
        self.out: list[torch.Tensor] = []

    @property
    def left(self) -> int:
        return len(self.tokens.query) - self.computed


def step(storage: KVStorage, case: Case, parts: Sequence[tuple[Running, int]], padding: int = 0) -> None:
    """One step of the given token counts."""
    spans, row = [], 0
    for running, count in parts:
        spans.append(Span(row, running.computed, count, running.blocks))
        row += count
    query, key, value = (
        torch.cat(
            [getattr(r.tokens, name)[r.computed : r.computed + count] for r, count in parts]
            + [torch.full_like(getattr(parts[0][0].tokens, name)[:1], torch.inf)] * padding
        )
        for name in ("query", "key", "value")
    )
    batch = AttentionBatch(spans, storage)
    out = batch.attend(0, query, key, value, SCALE, case.window, parts[0][0].tokens.sinks)
    assert not out[row:].any()
    for (running, count), span in zip(parts, spans, strict=True):
        running.out.append(out[span.row : span.row + count])
        running.computed += count


def make_storage(case: Case, dtype: torch.dtype) -> KVStorage:
    return KVStorage([case.shape], NUM_BLOCKS, BLOCK, dtype)


def whole(case: Case, tokens: Tokens, dtype: torch.dtype) -> torch.Tensor:
    running = Running(tokens, range(1, NUM_BLOCKS))
    step(make_storage(case, dtype), case, [(running, running.left)])
    return running.out[0]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_it_is_attention(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    borders = {1, TILE_QUERIES, TILE_QUERIES + 1, KEY_STEP - 1, KEY_STEP, KEY_STEP + 1, 2 * KEY_STEP + TILE_QUERIES + 3}
    for length in sorted(borders):
        tokens = make_tokens(case, length, dtype)
        error = (whole(case, tokens, dtype).double() - reference(tokens, case.window)).abs().max()
        assert error < (2e-6 if dtype == torch.float32 else 0.02), f"{length} tokens: off by {error}"


LENGTH = 2 * KEY_STEP + 37
CUTS = {
    "ones": [1] * LENGTH,
    "sevens": [7] * (LENGTH // 7) + [LENGTH % 7],
    "tiles": [TILE_QUERIES] * (LENGTH // TILE_QUERIES) + [LENGTH % TILE_QUERIES],
    "uneven": [100, 1, 1, 28, 130, 33],
    # With windows, the first and the last tile of a chunk may be over equally many but other keys.
    "across-a-key-step": [160, 104, 29],
    "last-and-first-tile": [248, 16, 29],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cuts_and_batch_mates_do_not_change_a_bit(name: str, dtype: torch.dtype, threads: int) -> None:
    case = CASES[name]
    tokens = make_tokens(case, LENGTH, dtype)
    expected = whole(case, tokens, dtype)
    for how, cuts in CUTS.items():
        assert sum(cuts) == LENGTH
        if how == "ones" and threads > 1:
            continue  # slow, and covered by one thread
        for mates in (0, 1, 3):
            storage = make_storage(case, dtype)
            mine = Running(tokens, range(20, 0, -1))
            others = [
                Running(make_tokens(case, 90 + 11 * i, dtype, i + 1), range(21 + i * 9, 30 + i * 9))
                for i in range(mates)
            ]
            for number, count in enumerate(cuts):
                beside = [(r, min(r.left, 1 + number * 5 % 13)) for r in others if r.left]
                parts = [*beside[:1], (mine, count), *beside[1:]]
                step(storage, case, parts, padding=-sum(n for _, n in parts) % 4)
            assert torch.equal(torch.cat(mine.out), expected), f"cut into {how}, {mates} beside"


@pytest.mark.parametrize("threads", [1, 3, 32], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_a_tile_over_many_keys_is_the_same_alone_and_in_a_batch(group: int, dtype: torch.dtype, threads: int) -> None:
    """Libraries like to give a lone tile to all threads, or to split its keys among them."""
    case = Case(LayerShape(4, group, 64, 64))
    length, blocks = 8 * KEY_STEP, 8 * KEY_STEP // BLOCK
    for seed in range(3):
        tokens = make_tokens(case, length, dtype, seed)
        alone = None
        for mates in (0, 1, 4):
            storage = KVStorage([case.shape], 1 + 5 * blocks, BLOCK, dtype)
            batch = [Running(tokens, range(1 + blocks * i, 1 + blocks * (i + 1))) for i in range(mates + 1)]
            for running in batch:
                step(storage, case, [(running, length - TILE_QUERIES)])
            step(storage, case, [(running, TILE_QUERIES) for running in batch])
            alone = batch[0].out[-1] if alone is None else alone
            for running in batch:
                assert torch.equal(running.out[-1], alone), f"{mates} beside"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gqa", "mla", "window", "sinks"])
def test_what_a_reused_block_held_does_not_leak(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tokens = make_tokens(case, 53, dtype)
    expected = whole(case, tokens, dtype)
    for stale in (torch.inf, torch.nan, 3.0e38):
        storage = make_storage(case, dtype)
        for pool in (*storage.keys, *storage.values):
            pool[1:] = stale
        running = Running(tokens, [9, 4, 11, 2])
        for count in (5, 20, 1, 27):
            step(storage, case, [(running, count)])
        assert torch.equal(torch.cat(running.out), expected)


def test_the_null_block_is_never_written() -> None:
    case = CASES["gqa"]
    storage = make_storage(case, torch.float32)
    running = Running(make_tokens(case, 40, torch.float32), [3, 2, 1])
    step(storage, case, [(running, 40)], padding=3)
    assert not storage.keys[0][0].any() and not storage.values[0][0].any()
    assert not storage.keys[0][4:].any()


def test_layers_of_different_shapes_share_a_block() -> None:
    cases = [CASES["gqa"], CASES["mla"]]
    shapes = [case.shape for case in cases]
    storage = KVStorage(shapes, 4, BLOCK, torch.float32)
    assert storage.block_bytes == block_bytes(shapes, BLOCK, torch.float32) >= BLOCK * 4 * (3 * 128 + 4 * 44)
    all_tokens = [make_tokens(case, 30, torch.float32) for case in cases]
    batch = AttentionBatch([Span(0, 0, 30, [2, 3])], storage)
    for layer, tokens in enumerate(all_tokens):
        out = batch.attend(layer, tokens.query, tokens.key, tokens.value, SCALE, None, None)
        assert torch.equal(out, whole(cases[layer], tokens, torch.float32))


def test_a_recorder_learns_shapes_and_refuses_gaps() -> None:
    recorder = ShapeRecorder()
    for layer in (1, 0):
        tokens = make_tokens(CASES["mla"], 2, torch.float32)
        recorder.attend(layer, tokens.query, tokens.key, tokens.value, SCALE, None, None)
    assert recorder.in_order() == [CASES["mla"].shape] * 2
    recorder.shapes[3] = recorder.shapes.pop(1)
    with pytest.raises(ModelError, match=r"layers \[0, 3\] were met"):
        recorder.in_order()
