"""Expert FFNs of many rows: the pairs of some experts at a time, as these come to hand. The host never waits.

Results are each pair's weighted partial; when all experts have been through, `combine` adds them in ascending expert
id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.cuda.expert_blocks import add_partials, down_block, gate_up_block
from expertd_engine.kernels.cuda.experts import ExpertLayout, Tiles, record_constants

_COMBINED = 64
"""Outputs that a program of `combine` adds for eight rows."""


@dataclass(frozen=True, slots=True)
class PairGroups:
    """The (row, choice) pairs of a layer by ascending expert, then row. All on the device."""

    pairs: Tensor
    """int32 `[P]`: row · top_k + choice."""
    begin: Tensor
    """int32 `[E + 1]`: first pair of each expert."""
    row_pairs: Tensor
    """int32 `[R, top_k]`: where in `pairs` each row's pairs stand, ascending."""

    @classmethod
    def of(cls, top_k_index: Tensor, num_experts: int) -> PairGroups:
        """From `[R, top_k]` expert ids, without a word to the host."""
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        every = torch.arange(num_experts + 1, device=chosen.device, dtype=chosen.dtype)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return cls(
            order.int(),
            torch.searchsorted(chosen, every).int(),
            place.view(top_k_index.shape).sort(dim=1).values.int(),
        )

    @property
    def count(self) -> Tensor:
        """int32 `[E]`: pairs of each expert."""
        return self.begin.diff()


def experts_prefill(
    layout: ExpertLayout,
    x: Tensor,
    weights: Tensor,
    groups: PairGroups,
    experts: Tensor,
    addresses: Tensor,
    inner: Tensor,
    partials: Tensor,
    *,
    tiles: tuple[Tiles, Tiles] | None = None,
    rows: int | None = None,
) -> None:
    """`partials` (float32 `[P, H]`) of the pairs of `experts` (int32 `[n]`), whose records lie at `addresses`.

    `x` `[R, H]` and `inner` `[P, I]` bfloat16 or float32, `weights` float32 `[R, top_k]`, `addresses` int64 `[n]`.
    A program takes `rows` pairs of an expert: by default what suits their number.
    """
    num_experts = len(groups.begin) - 1
    rows = rows or prefill_rows(layout, len(groups.pairs) // num_experts)
    gate_up, down = tiles or (prefill_tiles(layout), prefill_tiles(layout))
    top_k = weights.shape[1]
    count = len(experts)
    blocks = len(groups.pairs) // rows + count
    which = (groups.begin, groups.pairs, experts, addresses)
    _prefill_gate_up[(triton.cdiv(layout.inner, gate_up.outputs), blocks)](
        *which, count, x, inner,
        **record_constants(layout, gate_up, layout.inner, layout.hidden), TOP_K=top_k,
        GATE=layout.offsets[0], UP=layout.offsets[1], GATE_BIAS=layout.biases[0], UP_BIAS=layout.biases[1],
        ACTIVATION=layout.activation, ALPHA=layout.alpha, LIMIT=layout.limit,
        MT=rows, EXPERTS=triton.next_power_of_2(num_experts), num_warps=gate_up.warps, num_stages=gate_up.stages,
    )  # fmt: skip
    _prefill_down[(triton.cdiv(layout.hidden, down.outputs), blocks)](
        *which, count, inner, weights, partials,
        **record_constants(layout, down, layout.hidden, layout.inner),
        DOWN=layout.offsets[2], BIAS=layout.biases[2],
        MT=rows, EXPERTS=triton.next_power_of_2(num_experts), num_warps=down.warps, num_stages=down.stages,
    )  # fmt: skip


def combine(groups: PairGroups, partials: Tensor, out: Tensor) -> None:
    """Add each row's partials, ascending, to `out` (float32 `[R, H]`)."""
    rows, hidden = out.shape
    _combine_kernel[(triton.cdiv(hidden, _COMBINED), triton.cdiv(rows, 8))](
        groups.row_pairs, partials, out, rows,
        OUTPUTS=hidden, TOP_K=groups.row_pairs.shape[1], BN=_COMBINED, num_warps=4,
    )  # fmt: skip


def prefill_rows(layout: ExpertLayout, pairs: int) -> int:
    """Rows that a program multiplies together where an expert has so many pairs."""
    few = 32 if layout.quantised else 64
    return few if pairs <= 1.5 * few else 2 * few


def prefill_tiles(layout: ExpertLayout) -> Tiles:
    """How matrices are cut: for bfloat16 the fastest of three cuts on an H100."""
    if layout.format == "float32":
        return Tiles(16, 128, 4, 2)
    if layout.format == "bfloat16":
        return Tiles(128, 128, 8, 3)
    return Tiles(64, 64 if layout.format in ("int4", "int4s") else 128, 4, 3)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["experts", "addresses"])
def _prefill_gate_up(
    begin: tl.tensor, pairs: tl.tensor, experts: tl.tensor, addresses: tl.tensor, count: tl.tensor,
    x: tl.tensor, inner: tl.tensor,
    FORMAT: tl.constexpr, OUTPUTS: tl.constexpr, COLS: tl.constexpr, ROW: tl.constexpr, SCALE_ROW: tl.constexpr,
    BN: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, TOP_K: tl.constexpr,
    GATE: tl.constexpr, UP: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, MT: tl.constexpr, EXPERTS: tl.constexpr,
) -> None:  # fmt: skip
    which, start, last = part_of(begin, experts, count, MT, EXPERTS)
    if which < count:
        record = tl.load(addresses + which) & -2
        gate_up_block(
            record, record - record, tl.program_id(0), start, last, pairs, x, inner,
            FORMAT, OUTPUTS, COLS, ROW, SCALE_ROW, BN, SPAN, STAGES, TOP_K,
            GATE, UP, GATE_BIAS, UP_BIAS, ACTIVATION, ALPHA, LIMIT, MT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["experts", "addresses"])
def _prefill_down(
    begin: tl.tensor, pairs: tl.tensor, experts: tl.tensor, addresses: tl.tensor, count: tl.tensor,
    inner: tl.tensor, weights: tl.tensor, partials: tl.tensor,
    FORMAT: tl.constexpr, OUTPUTS: tl.constexpr, COLS: tl.constexpr, ROW: tl.constexpr, SCALE_ROW: tl.constexpr,
    BN: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    DOWN: tl.constexpr, BIAS: tl.constexpr, MT: tl.constexpr, EXPERTS: tl.constexpr,
) -> None:  # fmt: skip
    which, start, last = part_of(begin, experts, count, MT, EXPERTS)
    if which < count:
        record = tl.load(addresses + which) & -2
        down_block(
            record, record - record, tl.program_id(0), start, last, pairs, inner, weights, partials, COLS,
            FORMAT, OUTPUTS, COLS, ROW, SCALE_ROW, BN, SPAN, STAGES, DOWN, BIAS, MT,
        )  # fmt: skip


@triton.jit
def part_of(
    begin: tl.tensor, experts: tl.tensor, count: tl.tensor, MT: tl.constexpr, EXPERTS: tl.constexpr
) -> tl.tensor:
    """Which of `experts` this program serves (`count`: none), its first pair, and the end of that expert's pairs."""
    nth = tl.arange(0, EXPERTS)
    expert = tl.load(experts + nth, mask=nth < count, other=0)
    first = tl.load(begin + expert, mask=nth < count, other=0)
    last = tl.load(begin + expert + 1, mask=nth < count, other=0)
    ends = tl.cumsum((last - first + MT - 1) // MT, 0)
    mine = tl.program_id(1)
    which = tl.sum(tl.where((ends <= mine) & (nth < count), 1, 0), 0)
    is_mine = nth == which
    passed = tl.sum(tl.where(is_mine, ends - (last - first + MT - 1) // MT, 0), 0)
    start = tl.sum(tl.where(is_mine, first, 0), 0) + (mine - passed) * MT
    return which, start, tl.sum(tl.where(is_mine, last, 0), 0)


@triton.jit(do_not_specialize=["rows"])
def _combine_kernel(
    row_pairs: tl.tensor, partials: tl.tensor, out: tl.tensor, rows: tl.tensor,
    OUTPUTS: tl.constexpr, TOP_K: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    first = tl.program_id(1) * 8
    output = tl.program_id(0) * BN + tl.arange(0, BN)
    rest = tl.minimum(rows - first, 8)
    add_partials(row_pairs + first * TOP_K, partials, out + first * OUTPUTS, rest, output, OUTPUTS, TOP_K, BN)
