"""Heads on the device: normed, rotated, held within bounds and stored; activations; the best of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from expertd_engine.kernels.cuda.block import Argmax, HeadLayout, activate, store_qkv
from expertd_engine.kernels.cuda.norms import DeviceNorm
from expertd_engine.model.native_abi import NormKind, Rope
from support.interpreter import DEVICE

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_TOKENS, POSITIONS = 4, 2, 24, 16, 16, 64


@dataclass(frozen=True)
class Heads:
    rope: Rope = Rope.HALVES
    rotary: int = KEY_DIM
    norm: NormKind = NormKind.RMS
    whole: bool = False
    after: bool = False
    clip: float = 0.0


VARIANTS = [
    Heads(),
    Heads(rope=Rope.PAIRS, rotary=16),
    Heads(rope=Rope.NONE, norm=NormKind.NONE, rotary=0),
    Heads(rotary=16, whole=True, clip=0.7),
    Heads(norm=NormKind.LAYER),
    Heads(after=True),
]


def norm_of(kind: NormKind, length: int) -> DeviceNorm | None:
    if kind == NormKind.NONE:
        return None
    bias = torch.rand(length, device=DEVICE) if kind == NormKind.LAYER else None
    return DeviceNorm(kind, torch.rand(length, device=DEVICE), bias, 1e-5, length)


def layout_of(heads: Heads) -> HeadLayout:
    angles = torch.rand(POSITIONS, max(1, heads.rotary // 2), device=DEVICE)
    lengths = [count * KEY_DIM if heads.whole else KEY_DIM for count in (HEADS, KV_HEADS)]
    return HeadLayout(
        *(HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, heads.rope, heads.rotary, angles.cos(), angles.sin()),
        *(norm_of(heads.norm, lengths[0]), norm_of(heads.norm, lengths[1]), heads.after, heads.clip, 0.25),
    )


def normed(x: Tensor, norm: DeviceNorm | None) -> Tensor:
    """x `[heads, dim]`, each head for itself or all as one."""
    if norm is None:
        return x
    flat, weight = x.reshape(-1, norm.length), norm.weight.cpu().double()
    if norm.kind == NormKind.LAYER:
        assert norm.bias is not None
        return functional.layer_norm(flat, (norm.length,), weight, norm.bias.cpu().double(), 1e-5).view_as(x)
    return (flat * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + 1e-5) * weight).view_as(x)


def rotated(x: Tensor, layout: HeadLayout, position: int) -> Tensor:
    half = layout.rotary_dim // 2
    if layout.rope == Rope.NONE:
        return x
    assert layout.cos is not None and layout.sin is not None
    cos, sin = layout.cos[position].cpu().double(), layout.sin[position].cpu().double()
    first = torch.arange(half) * 2 if layout.rope == Rope.PAIRS else torch.arange(half)
    second = first + (1 if layout.rope == Rope.PAIRS else half)
    out = x.clone()
    out[:, first] = x[:, first] * cos - x[:, second] * sin
    out[:, second] = x[:, second] * cos + x[:, first] * sin
    return out


def placed(x: Tensor, layout: HeadLayout, norm: DeviceNorm | None, position: int) -> Tensor:
    """Heads `[heads, dim]` as attention reads them."""
    x = x.double()
    if not layout.norm_after_rope:
        x = normed(x, norm)
    if layout.clip > 0:
        x = x.clamp(-layout.clip, layout.clip)
    x = rotated(x, layout, position)
    return normed(x, norm) if layout.norm_after_rope else x


@pytest.mark.parametrize("heads", VARIANTS)
def test_heads_are_placed(heads: Heads) -> None:
    torch.manual_seed(0)
    layout = layout_of(heads)
    widths = [HEADS * KEY_DIM, KV_HEADS * KEY_DIM, KV_HEADS * VALUE_DIM]
    qkv = torch.randn(4, sum(widths) + 3)
    positions, row_table = torch.tensor([17, -1, 3, 40]), torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    tables = torch.tensor([[5, 2, 7, 0], [1, 3, 4, 0]], dtype=torch.int32)
    query = torch.full((4, widths[0]), 7.0, device=DEVICE)
    keys = torch.zeros(8, BLOCK_TOKENS, KV_HEADS, KEY_DIM, device=DEVICE)
    values = torch.zeros(8, BLOCK_TOKENS, KV_HEADS, VALUE_DIM, device=DEVICE)
    store_qkv(qkv.to(DEVICE), layout, query, keys, values, *(t.to(DEVICE) for t in (positions, row_table, tables)))
    stored = torch.zeros(8, BLOCK_TOKENS, dtype=torch.bool)
    for row in (0, 2, 3):
        position = int(positions[row])
        q, k, v = qkv[row, : sum(widths)].split(widths)
        place = int(tables[row_table[row], position // BLOCK_TOKENS]), position % BLOCK_TOKENS
        stored[place] = True
        value = v.clamp(-heads.clip, heads.clip) if heads.clip else v
        close(query[row].view(HEADS, -1), placed(q.view(HEADS, -1), layout, layout.query_norm, position) * 0.25)
        close(keys[place], placed(k.view(KV_HEADS, -1), layout, layout.key_norm, position))
        close(values[place], value.view(KV_HEADS, -1).double())
    assert not keys.cpu()[~stored].any() and not values.cpu()[~stored].any()
    assert bool((query[1] == 7.0).all())


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=2e-6)


def test_a_norm_of_all_heads_cannot_come_after_the_rotation() -> None:
    with pytest.raises(ValueError, match="a norm of heads is of 96 numbers"):
        layout_of(Heads(whole=True, after=True))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str) -> None:
    both = torch.randn(3, 100) * 3
    gate, up = both.chunk(2, dim=1)
    on_device, out = both.to(DEVICE), torch.empty(3, 50, device=DEVICE)
    activate(on_device[:, :50], on_device[:, 50:], out, kind)
    torch.testing.assert_close(out.cpu(), ACTIVATIONS[kind](gate) * up, rtol=1e-5, atol=1e-5)
    activate(None, on_device[:, 50:], out, kind)
    torch.testing.assert_close(out.cpu(), ACTIVATIONS[kind](up), rtol=1e-5, atol=1e-5)


def test_the_best_of_each_row() -> None:
    logits = torch.randn(3, 10_000)
    logits[0, 5] = torch.nan
    logits[1, [77, 9_000]] = 9.0
    logits[2] = -torch.inf
    best, out = Argmax(3, 10_000, DEVICE), torch.empty(3, dtype=torch.int64, device=DEVICE)
    for _ in range(2):  # what a launch leaves behind must not matter to the next
        best(logits.to(DEVICE), out)
    assert out.tolist() == [int(logits[0].nan_to_num(-9).argmax()), 77, 0]
