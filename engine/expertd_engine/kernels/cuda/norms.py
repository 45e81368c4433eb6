"""Norms of rows on the device, and what a layer adds to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.model.native_abi import NormKind

_WARP_ELEMENTS = 512


@dataclass(frozen=True, slots=True, eq=False)
class DeviceNorm:
    """RMS norm or layer norm over `length` numbers. `weight` and `bias` are float32 `[length]`."""

    kind: NormKind
    weight: Tensor
    bias: Tensor | None
    eps: float
    length: int


def norm_rows(x: Tensor, norm: DeviceNorm, out: Tensor) -> None:
    """norm(x) of each row: x `[R, length]` float32, out likewise or bfloat16; both may be the same tensor."""
    block = triton.next_power_of_2(norm.length)
    _norm_kernel[(len(x),)](
        *(x, norm.weight, norm.bias, out, x.stride(0), out.stride(0), norm.length, norm.eps),
        LAYER=norm.kind == NormKind.LAYER,
        BLOCK=block,
        num_warps=row_warps(block),
    )


def add_norm(
    hidden: Tensor, x: Tensor, norm: DeviceNorm | None, scale: float = 1.0, gate: Tensor | None = None
) -> None:
    """hidden += scale * norm(x * sigmoid(gate)): hidden and x `[R, H]` float32, gate float32 `[R, 1]`."""
    width = hidden.shape[1]
    block = triton.next_power_of_2(width)
    weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    _add_norm_kernel[(len(x),)](
        *(x, gate, weight, bias, hidden, x.stride(0), hidden.stride(0), 0 if gate is None else gate.stride(0)),
        *(width, eps, scale),
        LAYER=norm is not None and norm.kind == NormKind.LAYER,
        BLOCK=block,
        num_warps=row_warps(block),
    )


def row_warps(block: int) -> int:
    """Warps for a program that holds `block` numbers of a row."""
    return max(1, min(8, block // _WARP_ELEMENTS))


@triton.jit
def normalised(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, i: tl.tensor, n: tl.tensor, eps: tl.tensor, LAYER: tl.constexpr
) -> tl.tensor:
    """The norm of `n` numbers x, zeros elsewhere, of which x[j] is number i[j]. One axis."""
    gain = tl.load(weight + i, i < n, 0.0)  # on its way while all threads wait for the sums
    centred = tl.where(i < n, x - tl.sum(x, 0) / n, 0.0) if LAYER else x
    scaled = centred * (1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / n + eps))
    scaled = scaled * gain
    if bias is not None:
        scaled = scaled + tl.load(bias + i, i < n, 0.0)
    return scaled


@triton.jit
def _norm_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor, x_stride: tl.tensor, out_stride: tl.tensor,
    n: tl.tensor, eps: tl.tensor, LAYER: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    given = tl.load(x + row * x_stride + i, i < n, 0.0)
    made = normalised(given, weight, bias, i, n, eps, LAYER)
    tl.store(out + row * out_stride + i, made.to(out.dtype.element_ty), i < n)


@triton.jit
def _add_norm_kernel(
    x: tl.tensor, gate: tl.tensor, weight: tl.tensor, bias: tl.tensor, hidden: tl.tensor, x_stride: tl.tensor,
    hidden_stride: tl.tensor, gate_stride: tl.tensor, n: tl.tensor, eps: tl.tensor, scale: tl.tensor,
    LAYER: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    made = tl.load(x + row * x_stride + i, i < n, 0.0)
    if gate is not None:
        made = made * tl.sigmoid(tl.load(gate + row * gate_stride))
    if weight is not None:
        made = normalised(made, weight, bias, i, n, eps, LAYER)
    before = tl.load(hidden + row * hidden_stride + i, i < n, 0.0)
    tl.store(hidden + row * hidden_stride + i, before + made * scale, i < n)
