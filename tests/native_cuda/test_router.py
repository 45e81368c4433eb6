"""Routes on the device: the experts and weights that the CPU kernels choose, ties and NaN included."""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from expertd_engine.kernels.cuda.matrices import DeviceMatrix
from expertd_engine.kernels.cuda.norms import DeviceNorm
from expertd_engine.kernels.cuda.router import RouterLayout, route
from expertd_engine.kernels.library import FORMATS, Matrix
from expertd_engine.model.native_abi import Block, BlockCalls, Norm, NormKind, Router, Scores, Step
from support.interpreter import DEVICE
from support.kernels import needs_kernels, pool_on

HIDDEN, ROWS, BLOCK_TOKENS, DIM = 40, 6, 16, 16


@dataclass(frozen=True)
class Rule:
    scores: Scores
    experts: int
    top_k: int
    groups: int = 0
    groups_kept: int = 0
    group_best: int = 0
    shares: bool = False
    has_bias: bool = False
    scale: float = 1.0


RULES = [
    Rule(Scores.SOFTMAX, 16, 4, shares=True),
    Rule(Scores.SOFTMAX, 11, 3, scale=2.5),
    Rule(Scores.CHOSEN, 10, 2),
    Rule(Scores.SIGMOID, 12, 3, 3, 2, 2, True, True, 1.5),
    Rule(Scores.SOFTMAX, 8, 2, 4, 1, 1),
]


class World:
    """A layer of which only the router matters: attention gives nothing, so that the router's rows are norm(x)."""

    def __init__(self, rule: Rule, spoil: str) -> None:
        rng = np.random.default_rng(1)
        self.rule = rule
        self.x = rng.standard_normal((ROWS, HIDDEN)).astype(np.float32)
        self.matrix = rng.standard_normal((rule.experts, HIDDEN)).astype(np.float32)
        if spoil == "ties":
            self.matrix[1::2] = self.matrix[: rule.experts - 1 : 2][: len(self.matrix[1::2])]
        elif spoil == "nan":
            self.matrix[1:3, 0] = np.nan
        self.gain = rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
        self.favour = (rng.standard_normal(rule.experts) / 3).astype(np.float32) if rule.has_bias else None

    def on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """Experts, weights, and the normed rows."""
        rule, count = self.rule, self.rule.experts
        matrix = DeviceMatrix.of("float32", torch.from_numpy(self.matrix), count, HIDDEN, None, DEVICE)
        favour = None if self.favour is None else torch.from_numpy(self.favour).to(DEVICE)
        layout = RouterLayout(
            *(matrix, favour, rule.top_k, rule.scores, rule.groups, rule.groups_kept, rule.group_best),
            *(rule.shares, 1e-20, rule.scale),
        )
        norm = DeviceNorm(NormKind.RMS, torch.from_numpy(self.gain).to(DEVICE), None, 1e-6, HIDDEN)
        x = torch.from_numpy(self.x).to(DEVICE)
        index = torch.full((ROWS, rule.top_k), -1, device=DEVICE, dtype=torch.int32)
        logits, weights = torch.empty(ROWS, count, device=DEVICE), torch.empty(ROWS, rule.top_k, device=DEVICE)
        y, done = torch.empty_like(x), torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)
        for _ in range(2):  # what a launch leaves behind must not matter to the next
            route(x, norm, layout, logits, index, weights, y, done)
        return index.cpu(), weights.cpu(), y.cpu()

    def on_cpu(self) -> tuple[Tensor, Tensor, Tensor]:
        keep: list[np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = []

        def at(values: object, dtype: type[np.generic] = np.float32) -> int:
            keep.append(np.ascontiguousarray(values, dtype))
            return keep[-1].ctypes.data

        def matrix(values: object) -> Matrix:
            address = at(values)
            return Matrix(address, None, FORMATS["float32"], *keep[-1].shape)

        rule = self.rule
        router = Router(matrix(self.matrix), None if self.favour is None else at(self.favour), rule.experts, rule.top_k)
        router.scores, router.groups, router.groups_kept = rule.scores, rule.groups, rule.groups_kept
        router.group_best, router.shares, router.epsilon, router.scale = rule.group_best, rule.shares, 1e-20, rule.scale
        nothing, zeros = np.zeros((DIM, HIDDEN)), np.zeros((HIDDEN, DIM))
        block = Block(router=router, hidden=HIDDEN, heads=1, kv_heads=1, key_dim=DIM, value_dim=DIM, scale=1.0)
        block.query, block.key, block.value, block.output = (matrix(m) for m in (nothing, nothing, nothing, zeros))
        block.ffn_norm = Norm(at(self.gain), None, NormKind.RMS, HIDDEN, 1e-6)
        block.value_offset, block.positions, block.attention_residual = BLOCK_TOKENS * DIM * 4, BLOCK_TOKENS, 1.0
        step = Step(ROWS, at(range(ROWS), np.int64), 1, at([0, ROWS], np.int64), at([0], np.int64), at([1], np.int32))
        step.blocks, step.block_stride, step.block_tokens = (
            at(np.zeros(4 * BLOCK_TOKENS * DIM)),
            2 * block.value_offset,
            16,
        )
        step.hidden, step.normed, step.added = at(self.x.copy()), at(np.zeros_like(self.x)), at(np.zeros_like(self.x))
        normed = keep[-2]
        step.logits = at(np.zeros((ROWS, rule.experts)))
        step.experts, step.weights = at(np.zeros((ROWS, rule.top_k)), np.int64), at(np.zeros((ROWS, rule.top_k)))
        with pool_on("") as pool:
            BlockCalls(pool.library).forward(pool.address, byref(block), None, None, None, byref(step))
        return torch.from_numpy(keep[-2]), torch.from_numpy(keep[-1]), torch.from_numpy(normed)


@needs_kernels
@pytest.mark.parametrize(
    ("rule", "spoil"),
    [(rule, spoil) for rule in RULES for spoil in ("", "ties", "nan") if not (spoil == "nan" and rule.groups)],
)
def test_routes_are_those_of_the_cpu(rule: Rule, spoil: str) -> None:
    world = World(rule, spoil)
    index, weights, y = world.on_device()
    their_index, their_weights, their_y = world.on_cpu()
    assert torch.equal(index.long(), their_index)
    torch.testing.assert_close(weights, their_weights, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(y, their_y, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_is_refused() -> None:
    eight = DeviceMatrix.of("float32", torch.zeros(8, 32), 8, 32, None, DEVICE)
    with pytest.raises(ValueError, match="8 experts are not 3 equal groups"):
        RouterLayout(eight, None, 2, Scores.SOFTMAX, 3, 1, 1, False, 0.0, 1.0)
    with pytest.raises(ValueError, match="are not selected here"):
        RouterLayout(eight, None, 2, Scores.LOGITS, 0, 0, 0, False, 0.0, 1.0)
