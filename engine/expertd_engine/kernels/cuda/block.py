"""What stands between the products of a layer, on the device: heads normed, rotated and stored; activations; argmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.cuda.expert_blocks import activated, gated
from expertd_engine.kernels.cuda.norms import DeviceNorm
from expertd_engine.model.native_abi import NormKind, Rope

_ARGMAX_BLOCK = 4096


@dataclass(frozen=True, slots=True, eq=False)
class HeadLayout:
    """What becomes of a row's query, key and value heads before attention.

    Queries and keys are normed, held within +-`clip` (0: not) and rotated by `cos` and `sin` `[positions, rotary_dim /
    2]`, or rotated before they are normed; queries are multiplied by `scale`.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    rope: Rope
    rotary_dim: int
    cos: Tensor | None
    sin: Tensor | None
    query_norm: DeviceNorm | None
    key_norm: DeviceNorm | None
    norm_after_rope: bool
    clip: float
    scale: float

    def __post_init__(self) -> None:
        for norm, heads in ((self.query_norm, self.heads), (self.key_norm, self.kv_heads)):
            if norm is None:
                continue
            allowed = (self.key_dim,) if self.norm_after_rope else (self.key_dim, heads * self.key_dim)
            if norm.length not in allowed:
                raise ValueError(f"a norm of heads is of {norm.length} numbers; allowed are {allowed}")


def store_qkv(
    qkv: Tensor,
    layout: HeadLayout,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    row_table: Tensor,
    tables: Tensor,
) -> None:
    """Queries to `query`, keys and values to their blocks; rows of negative position (padding) leave nothing.

    qkv `[R, ...]` float32 holds a row's query, key and value heads; query float32 `[R, heads * key_dim]`; the rest as
    in `attention.attend`.
    """
    first = layout.query_norm
    _place_kernel[(len(qkv), layout.heads + 2 * layout.kv_heads)](
        *(qkv, query, keys, values, positions, row_table, tables, layout.cos, layout.sin),
        *_weights(layout.query_norm),
        *_weights(layout.key_norm),
        *(qkv.stride(0), query.stride(0), *keys.stride()[:3], *values.stride()[:3], tables.stride(0)),
        *(layout.clip, layout.scale),
        HEADS=layout.heads,
        KV_HEADS=layout.kv_heads,
        KEY_DIM=layout.key_dim,
        VALUE_DIM=layout.value_dim,
        BLOCK_TOKENS=keys.shape[1],
        ROPE=int(layout.rope),
        ROTARY=layout.rotary_dim,
        LAYER=first is not None and first.kind == NormKind.LAYER,
        WHOLE=first is not None and first.length != layout.key_dim,
        NORM_LAST=layout.norm_after_rope,
        CLIPS=layout.clip > 0,
        BLOCK_D=triton.next_power_of_2(max(layout.key_dim, layout.value_dim)),
        num_warps=1,
    )


def activate(gate: Tensor | None, up: Tensor, out: Tensor, kind: str, alpha: float = 0.0, limit: float = 0.0) -> None:
    """out = act(gate) * up, or act(up) without a gate: all `[R, I]` of any float type, or parts of such rows.

    `kind` is one of `experts.ACTIVATIONS`.
    """
    width = up.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    _activate_kernel[(len(up), triton.cdiv(width, block))](
        *(gate, up, out, 0 if gate is None else gate.stride(0), up.stride(0), out.stride(0), width),
        KIND=kind,
        ALPHA=alpha,
        LIMIT=limit,
        BLOCK=block,
        num_warps=4,
    )


class Argmax:
    """The best of each row of logits. Owns what programs leave for the last one."""

    def __init__(self, rows: int, width: int, device: torch.device | str) -> None:
        """For up to `rows` rows of `width` numbers."""
        self._parts = triton.cdiv(width, _ARGMAX_BLOCK)
        self._best = torch.empty(rows, self._parts, device=device)
        self._ids = torch.empty(rows, self._parts, dtype=torch.int32, device=device)
        self._done = torch.zeros(rows, dtype=torch.int32, device=device)

    def __call__(self, logits: Tensor, out: Tensor) -> None:
        """out int64 `[R]`: of float32 `[R, width]` the highest, of equals the lowest; NaN counts as the least."""
        _argmax_kernel[(len(logits), self._parts)](
            *(logits, self._best, self._ids, self._done, out, logits.stride(0), logits.shape[1]),
            PARTS=self._parts,
            BLOCK=_ARGMAX_BLOCK,
            BLOCK_PARTS=triton.next_power_of_2(self._parts),
            num_warps=8,
        )


def _weights(norm: DeviceNorm | None) -> tuple[Tensor | None, Tensor | None, float]:
    return (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)


@triton.jit
def _place_kernel(
    qkv: tl.tensor, query: tl.tensor, keys: tl.tensor, values: tl.tensor, positions: tl.tensor,
    row_table: tl.tensor, tables: tl.tensor, cos: tl.tensor, sin: tl.tensor,
    query_weight: tl.tensor, query_bias: tl.tensor, query_eps: tl.tensor,
    key_weight: tl.tensor, key_bias: tl.tensor, key_eps: tl.tensor,
    qkv_stride: tl.tensor, query_stride: tl.tensor, key_block: tl.tensor, key_token: tl.tensor, key_head: tl.tensor,
    value_block: tl.tensor, value_token: tl.tensor, value_head: tl.tensor, table_stride: tl.tensor,
    clip: tl.tensor, scale: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr, LAYER: tl.constexpr, WHOLE: tl.constexpr,
    NORM_LAST: tl.constexpr, CLIPS: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row).to(tl.int64)
    if position >= 0:
        d = tl.arange(0, BLOCK_D)
        begin = qkv + row * qkv_stride
        angles = position * (ROTARY // 2)
        table = tables + tl.load(row_table + row).to(tl.int64) * table_stride
        block = tl.load(table + position // BLOCK_TOKENS).to(tl.int64)
        inside = position % BLOCK_TOKENS
        if head < HEADS:
            made = _placed(
                begin, query_weight, query_bias, cos, sin, angles, head, query_eps, clip,
                HEADS, KEY_DIM, ROPE, ROTARY, LAYER, WHOLE, NORM_LAST, CLIPS, BLOCK_D,
            )  # fmt: skip
            tl.store(query + row * query_stride + head * KEY_DIM + d, made * scale, d < KEY_DIM)
        elif head < HEADS + KV_HEADS:
            made = _placed(
                begin + HEADS * KEY_DIM, key_weight, key_bias, cos, sin, angles, head - HEADS, key_eps, clip,
                KV_HEADS, KEY_DIM, ROPE, ROTARY, LAYER, WHOLE, NORM_LAST, CLIPS, BLOCK_D,
            )  # fmt: skip
            to = keys + block * key_block + inside * key_token + (head - HEADS) * key_head
            tl.store(to + d, made.to(keys.dtype.element_ty), d < KEY_DIM)
        else:
            which = head - HEADS - KV_HEADS
            made = tl.load(begin + (HEADS + KV_HEADS) * KEY_DIM + which * VALUE_DIM + d, d < VALUE_DIM, 0.0)
            if CLIPS:
                made = tl.minimum(tl.maximum(made, -clip), clip)
            to = values + block * value_block + inside * value_token + which * value_head
            tl.store(to + d, made.to(values.dtype.element_ty), d < VALUE_DIM)


@triton.jit
def _placed(
    begin: tl.tensor, weight: tl.tensor, bias: tl.tensor, cos: tl.tensor, sin: tl.tensor, angles: tl.tensor,
    head: tl.tensor, eps: tl.tensor, clip: tl.tensor,
    COUNT: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr, ROTARY: tl.constexpr, LAYER: tl.constexpr,
    WHOLE: tl.constexpr, NORM_LAST: tl.constexpr, CLIPS: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Head `head` of the COUNT at `begin`, normed and rotated: each number x beside the number y it rotates with."""
    d = tl.arange(0, BLOCK_D)
    HALF: tl.constexpr = ROTARY // 2
    if ROPE == 2:
        other, angle, sign = d ^ 1, d // 2, tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        other = tl.where(d < HALF, d + HALF, d - HALF)
        angle, sign = tl.where(d < HALF, d, d - HALF), tl.where(d < HALF, -1.0, 1.0)
    stored = d < DIM
    turns = d < (ROTARY if ROPE else 0)
    x = tl.load(begin + head * DIM + d, stored, 0.0)
    y = tl.load(begin + head * DIM + other, turns, 0.0)
    if weight is not None and not NORM_LAST:
        if WHOLE:
            i = tl.arange(0, BLOCK_D * triton.next_power_of_2(COUNT))
            mean, factor = _moments(tl.load(begin + i, i < COUNT * DIM, 0.0), i < COUNT * DIM, COUNT * DIM, eps, LAYER)
            first = head * DIM
        else:
            mean, factor = _moments(x, stored, DIM, eps, LAYER)
            first = 0
        x = _scaled(x, mean, factor, weight, bias, first + d, stored)
        y = _scaled(y, mean, factor, weight, bias, first + other, turns)
    if CLIPS:
        x = tl.minimum(tl.maximum(x, -clip), clip)
        y = tl.minimum(tl.maximum(y, -clip), clip)
    if ROPE:
        x = x * tl.load(cos + angles + angle, turns, 1.0) + sign * y * tl.load(sin + angles + angle, turns, 0.0)
    if weight is not None and NORM_LAST:
        mean, factor = _moments(x, stored, DIM, eps, LAYER)
        x = _scaled(x, mean, factor, weight, bias, d, stored)
    return x


@triton.jit
def _moments(x: tl.tensor, stored: tl.tensor, COUNT: tl.constexpr, eps: tl.tensor, LAYER: tl.constexpr) -> tl.tensor:
    """What a norm of `x`, of which COUNT are stored, subtracts, and what it multiplies with."""
    mean = 0.0
    if LAYER:
        mean = tl.sum(x, 0) / COUNT
    centred = tl.where(stored, x - mean, 0.0)
    return mean, 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / COUNT + eps)


@triton.jit
def _scaled(
    x: tl.tensor, mean: tl.tensor, factor: tl.tensor, weight: tl.tensor, bias: tl.tensor, at: tl.tensor, mask: tl.tensor
) -> tl.tensor:
    x = (x - mean) * factor * tl.load(weight + at, mask, 0.0)
    if bias is not None:
        x = x + tl.load(bias + at, mask, 0.0)
    return x


@triton.jit
def _activate_kernel(
    gate: tl.tensor, up: tl.tensor, out: tl.tensor, gate_stride: tl.tensor, up_stride: tl.tensor,
    out_stride: tl.tensor, width: tl.tensor, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(up + row * up_stride + i, i < width, 0.0).to(tl.float32)
    if gate is None:
        made = activated(u, KIND)
    else:
        g = tl.load(gate + row * gate_stride + i, i < width, 0.0).to(tl.float32)
        made = gated(g, u, KIND, ALPHA, LIMIT)
    tl.store(out + row * out_stride + i, made.to(out.dtype.element_ty), i < width)


@triton.jit
def _argmax_kernel(
    logits: tl.tensor, best: tl.tensor, ids: tl.tensor, done: tl.tensor, out: tl.tensor, stride: tl.tensor,
    width: tl.tensor, PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
) -> None:  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(logits + row * stride + i, i < width, float("-inf"))
    found, at = _highest(tl.where(given == given, given, float("-inf")), i)
    tl.store(best + row * PARTS + part, found)
    tl.store(ids + row * PARTS + part, at)
    tl.debug_barrier()  # all threads have written before one says so
    if tl.atomic_add(done + row, 1, sem="acq_rel") == PARTS - 1:
        tl.store(done + row, 0)
        p = tl.arange(0, BLOCK_PARTS)
        theirs = tl.load(best + row * PARTS + p, p < PARTS, float("-inf"), cache_modifier=".cg")
        places = tl.load(ids + row * PARTS + p, p < PARTS, 2147483647, cache_modifier=".cg")
        _, at = _highest(theirs, places)
        tl.store(out + row, at.to(tl.int64))


@triton.jit
def _highest(values: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """The highest of `values`, and of those that are it the lowest id."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, ids, 2147483647), 0)
