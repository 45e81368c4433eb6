"""Which experts a row goes to, on the device: one launch norms the row, scores all experts and selects.

The programs of a row each score some experts; the last of them to end selects. Chosen are the same experts as on the
CPU: of equals the one with the lower id.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from expertd_engine.kernels.cuda.matrices import DeviceMatrix
from expertd_engine.kernels.cuda.norms import DeviceNorm, normalised
from expertd_engine.kernels.cuda.selection import (
    HELD,
    MOST_EXPERTS,
    by_logits,
    by_scores,
    scored,
    sums_of_five,
    sums_of_two,
)
from expertd_engine.kernels.cuda.substitute import Among, answer, ask, most_answering, stand_ins
from expertd_engine.model.native_abi import NormKind, Scores

_EXPERTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True, eq=False)
class RouterLayout:
    """A layer's router: `expertd_router` of the CPU kernels, whose words these are."""

    matrix: DeviceMatrix
    """`[experts, hidden]`, float32 or bfloat16."""
    bias: Tensor | None
    """float32 `[experts]`: added to scores where experts are chosen."""
    top_k: int
    scores: Scores
    groups: int
    groups_kept: int
    group_best: int
    shares: bool
    epsilon: float
    scale: float

    def __post_init__(self) -> None:
        if self.matrix.format not in ("float32", "bfloat16"):
            raise ValueError(f"a router of {self.matrix.format} is not supported; allowed are float32 and bfloat16")
        if self.scores not in (Scores.SOFTMAX, Scores.SIGMOID, Scores.CHOSEN):
            raise ValueError(f"scores of kind {self.scores!r} are not selected here")
        if self.matrix.rows > MOST_EXPERTS:
            raise ValueError(f"{self.matrix.rows} experts cannot be selected from: at most {MOST_EXPERTS} can")
        if self.groups > 1 and self.matrix.rows % self.groups:
            raise ValueError(f"{self.matrix.rows} experts are not {self.groups} equal groups")


def route(
    x: Tensor,
    norm: DeviceNorm | None,
    router: RouterLayout,
    logits: Tensor,
    index: Tensor,
    weights: Tensor,
    y: Tensor | None,
    done: Tensor,
    among: Among | None = None,
) -> None:
    """The experts of rows x `[R, hidden]` float32 and their weights, in order of score.

    y (any float type, `[R, hidden]`) is norm(x), what experts read; None where they read x. logits float32 `[R,
    experts]`; index int32 or int64 and weights float32 `[R, top_k]`; done int32 `[R]`, zeros between launches. `among`:
    of virtual mode, where it is left who computes in the place of what was chosen, and nothing in index and weights.
    """
    matrix, groups = router.matrix, max(1, router.groups)
    weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    block = triton.next_power_of_2(matrix.cols)
    _route_kernel[(len(x), triton.cdiv(matrix.rows, _EXPERTS_AT_ONCE))](
        *(x, weight, bias, matrix.data, matrix.bias, router.bias, logits, index, weights, y, done),
        *_pointers(among),
        *(x.stride(0), logits.stride(0), index.stride(0), weights.stride(0), 0 if y is None else y.stride(0)),
        *(0 if among is None else among.met.stride(0), eps, router.epsilon, router.scale),
        COLS=matrix.cols,
        PADDED=matrix.padded,
        EXPERTS=matrix.rows,
        BLOCK=block,
        BLOCK_E=_EXPERTS_AT_ONCE,
        LAYER=norm is not None and norm.kind == NormKind.LAYER,
        TOP_K=router.top_k,
        SCORES=int(router.scores),
        GROUPS=groups,
        KEPT=router.groups_kept,
        BEST=router.group_best,
        SHARES=router.shares or router.scores == Scores.CHOSEN,
        BLOCK_G=triton.next_power_of_2(groups),
        BLOCK_S=triton.next_power_of_2(matrix.rows // groups),
        WIDTH=1 if among is None else among.experts.shape[1],
        SHARED=1 if among is None else among.shared_by,
        ALONE=len(x) == 1,
        PLAIN=groups == 1 and router.bias is None,
        num_warps=max(1, min(8, block // 512)),
    )


def _pointers(among: Among | None) -> tuple[Tensor | None, ...]:
    if among is None:
        return (None,) * 8
    told = (among.asked, among.met, among.experts, among.weights)
    return among.held, among.counted, among.limits, among.num_rows, *told


@triton.jit
def _route_kernel(
    x: tl.tensor, weight: tl.tensor, norm_bias: tl.tensor, data: tl.tensor, bias: tl.tensor, favour: tl.tensor,
    logits: tl.tensor, index: tl.tensor, weights: tl.tensor, y: tl.tensor, done: tl.tensor,
    held: tl.tensor, counted: tl.tensor, limits: tl.tensor, num_rows: tl.tensor, asked: tl.tensor, met: tl.tensor,
    served: tl.tensor, shares: tl.tensor,
    x_stride: tl.tensor, logits_stride: tl.tensor, index_stride: tl.tensor, weights_stride: tl.tensor,
    y_stride: tl.tensor, met_stride: tl.tensor, eps: tl.tensor, epsilon: tl.tensor, scale: tl.tensor,
    COLS: tl.constexpr, PADDED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
    LAYER: tl.constexpr, TOP_K: tl.constexpr, SCORES: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, BEST: tl.constexpr, SHARES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    WIDTH: tl.constexpr, SHARED: tl.constexpr, ALONE: tl.constexpr, PLAIN: tl.constexpr,
) -> None:  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)
    rows = tl.load(
        data + e[:, None] * PADDED + i[None, :], (e < EXPERTS)[:, None] & (i < COLS)[None, :], 0.0
    ).to(tl.float32)  # fmt: skip
    given = tl.load(x + row * x_stride + i, i < COLS, 0.0)
    limit, is_real, here = 1.0, row >= 0, e
    if held is not None:  # from far away, and on its way while the matrix is
        limit, is_real = tl.load(limits + row), row < tl.load(num_rows)
        here = tl.load(held + e, e < EXPERTS, 0)
        counted += row * EXPERTS
    if weight is not None:
        given = normalised(given, weight, norm_bias, i, COLS, eps, LAYER)
    if y is not None and part == 0:
        tl.store(y + row * y_stride + i, given.to(y.dtype.element_ty), i < COLS)
    found = tl.sum(rows * given[None, :], 1)
    if bias is not None:
        found = found + tl.load(bias + e, e < EXPERTS, 0.0)
    tl.store(logits + row * logits_stride + e, found, e < EXPERTS)
    if held is not None:
        tl.store(counted + e, (here * HELD + 1).to(tl.float32), e < EXPERTS)
    tl.debug_barrier()  # all threads have written before one says so
    if tl.atomic_add(done + row, 1, sem="acq_rel") == tl.num_programs(1) - 1:  # and all may read what others have
        tl.store(done + row, 0)
        _select(
            logits + row * logits_stride, index + row * index_stride, weights + row * weights_stride, favour, counted,
            tl.where(i < COLS, given, 0.0), limit, is_real, asked, met, row * met_stride, served, shares, row * WIDTH,
            epsilon, scale,
            EXPERTS, TOP_K, SCORES, GROUPS, KEPT, BEST, SHARES, BLOCK_G, BLOCK_S, WIDTH, SHARED, ALONE, PLAIN,
        )  # fmt: skip


@triton.jit
def _select(
    logits: tl.tensor, index: tl.tensor, weights: tl.tensor, favour: tl.tensor, counted: tl.tensor,
    seen: tl.tensor, limit: tl.tensor, is_real: tl.tensor, asked: tl.tensor, met: tl.tensor, met_at: tl.tensor,
    served: tl.tensor, shares: tl.tensor, served_at: tl.tensor, epsilon: tl.tensor, scale: tl.tensor,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SCORES: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    BEST: tl.constexpr, SHARES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, WIDTH: tl.constexpr,
    SHARED: tl.constexpr, ALONE: tl.constexpr, PLAIN: tl.constexpr,
) -> None:  # fmt: skip
    """One row's experts, by logits that are all there. Few sums, several at once: at each all threads wait."""
    g, s = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_S)[None, :]
    lives = (g < GROUPS) & (s < EXPERTS // GROUPS)
    expert = tl.where(lives, g * (EXPERTS // GROUPS) + s, 2147483647)
    score = tl.load(logits + expert, lives, float("-inf"))
    is_held, counts, length = lives, 0, 0.0
    if counted is not None:  # while logits are on their way; padding asks for nothing
        length = tl.where(is_real, tl.sqrt(tl.sum(seen * seen, 0)), 0.0)
    if PLAIN:
        place, ahead, is_held, highest, counts = by_logits(logits, counted, EXPERTS, BLOCK_S, TOP_K)
        place, ahead = tl.reshape(place, score.shape), tl.reshape(ahead, score.shape)
        is_held = tl.reshape(is_held, score.shape)
    else:
        score = scored(score, lives, SCORES)
        place = by_scores(score, expert, g, lives, favour, GROUPS, KEPT, BEST)
        ahead, highest = place, tl.max(tl.max(tl.where(place == 0, score, float("-inf")), 1), 0)
    if SCORES == 4 or (PLAIN and SCORES == 2):
        score = tl.where(lives, tl.exp(score - highest), 0.0)
    elif PLAIN:
        score = scored(score, lives, SCORES)
    chosen = lives & (place < TOP_K)
    taken = tl.where(chosen, score, 0.0)
    lost, serving, serving_each, serves, each = 0.0, 0.0, 0.0, chosen, chosen
    if counted is None:
        whole, total = sums_of_two(score, taken)
    else:
        if not PLAIN:
            is_held = lives & (tl.load(counted + expert, lives, 0.0) > 1.0)
            counts = tl.sum(tl.sum(tl.where(is_held, HELD, chosen.to(tl.int32)), 1), 0)
        else:
            missed = counts % HELD
            serves = stand_ins(is_held, chosen, ahead, counts, most_answering(missed, TOP_K, SHARED), TOP_K)
            each = stand_ins(is_held, chosen, ahead, counts, missed, TOP_K)
        worth = tl.maximum(score, 1e-30)
        whole, total, lost, serving, serving_each = sums_of_five(
            score, taken, tl.where(is_held, 0.0, taken), tl.where(serves, worth, 0.0), tl.where(each, worth, 0.0)
        )
    per_score, total_share = scale, total
    if PLAIN and SCORES == 2:
        per_score, total_share = scale / whole, total / whole
    if SHARES:
        per_score = per_score / (total_share + epsilon)
    if counted is None:
        _leave(index, weights, expert, lives, place, whole, score * per_score, TOP_K, PLAIN and SCORES == 2)
    else:
        weight = taken * per_score
        ask(asked + expert, length * weight, chosen, lives, ALONE)
        answer(
            logits, score, expert, g, lives, place, ahead, is_held, serving, serving_each, weight, total * per_score,
            lost * per_score, counts, favour, limit, met + met_at, served + served_at, shares + served_at,
            TOP_K, WIDTH, SHARED, SCORES, GROUPS, KEPT, BEST, PLAIN,
        )  # fmt: skip


@triton.jit
def _leave(
    index: tl.tensor, weights: tl.tensor, expert: tl.tensor, lives: tl.tensor, place: tl.tensor, whole: tl.tensor,
    weight: tl.tensor, TOP_K: tl.constexpr, SUMMED: tl.constexpr,
) -> None:  # fmt: skip
    """The chosen in their places, and their weights. `SUMMED`: weights were divided by the sum `whole`."""
    if SUMMED:
        place = tl.where(whole == whole, place, expert)  # one NaN, and all scores are: ids alone tell them apart
    told = lives & (place < TOP_K)
    tl.store(index + place, expert.to(index.dtype.element_ty), told)
    tl.store(weights + place, weight, told)
