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
from expertd_engine.kernels.cuda.substitute import MET, Among
from expertd_engine.kernels.library import FORMATS, Matrix
from expertd_engine.model.among_held import Select, among_held
from expertd_engine.model.native_abi import Block, BlockCalls, Norm, NormKind, Router, Scores, Step
from expertd_engine.model.router_rules import Groups, ScoreTopK, TopKSoftmax, share, sigmoid_scores, softmax_scores
from expertd_engine.model.substitution import SHARED_FROM, widest
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
SIX = Rule(Scores.SIGMOID, 16, 6, 4, 2, 2, True, True, 1.5)
EIGHT = Rule(Scores.SOFTMAX, 16, 8, shares=True)
"""Of equal logits each choice weighs an eighth, but for roundings."""


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

    def on_device(self, among: Among | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Experts, weights, the normed rows, and logits."""
        rule, count = self.rule, self.rule.experts
        matrix = DeviceMatrix.of("float32", torch.from_numpy(self.matrix), count, HIDDEN, None, DEVICE)
        favour = None if self.favour is None else torch.from_numpy(self.favour).to(DEVICE)
        layout = RouterLayout(
            *(matrix, favour, rule.top_k, rule.scores, rule.groups, rule.groups_kept, rule.group_best),
            *(rule.shares, 1e-20, rule.scale),
        )
        norm = DeviceNorm(NormKind.RMS, torch.from_numpy(self.gain).to(DEVICE), None, 1e-6, HIDDEN)
        x = torch.from_numpy(self.x).to(DEVICE)
        rows = len(x)
        index = torch.full((rows, rule.top_k), -1, device=DEVICE, dtype=torch.int32)
        logits, weights = torch.empty(rows, count, device=DEVICE), torch.empty(rows, rule.top_k, device=DEVICE)
        y, done = torch.empty_like(x), torch.zeros(rows, dtype=torch.int32, device=DEVICE)
        for _ in range(2 if among is None else 1):  # what a launch leaves behind must not matter to the next
            route(x, norm, layout, logits, index, weights, y, done, among)
        return index.cpu(), weights.cpu(), y.cpu(), logits.cpu()

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
    index, weights, y, _ = world.on_device()
    their_index, their_weights, their_y = world.on_cpu()
    assert torch.equal(index.long(), their_index)
    torch.testing.assert_close(weights, their_weights, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(y, their_y, rtol=1e-6, atol=1e-6)


LIMITS = (1.0, 0.6, 0.3, 0.1, 0.0, 1.0)
"""Of substituted mass, by row; the last row is padding."""


@pytest.mark.parametrize("shared_by", [1, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("held_more", "spoil"), [(0, ""), (3, ""), (3, "ties")])
def test_rows_among_held_experts_are_those_of_the_cpu(rule: Rule, shared_by: int, held_more: int, spoil: str) -> None:
    world, width = World(rule, spoil), widest(rule.top_k, shared_by)
    held = torch.zeros(rule.experts, dtype=torch.int32)
    held[torch.randperm(rule.experts, generator=torch.Generator().manual_seed(3))[: rule.top_k + held_more]] = 1
    among = Among(
        held=held.to(DEVICE), counted=torch.empty(ROWS, rule.experts, device=DEVICE),
        limits=torch.tensor(LIMITS, device=DEVICE),
        num_rows=torch.tensor([ROWS - 1], dtype=torch.int32, device=DEVICE),
        asked=torch.zeros(rule.experts, device=DEVICE), met=torch.zeros(ROWS, 2 * MET, device=DEVICE)[:, MET:],
        experts=torch.full((ROWS, width), -1, dtype=torch.int32, device=DEVICE),
        weights=torch.full((ROWS, width), -1.0, device=DEVICE), shared_by=shared_by,
    )  # fmt: skip
    world.on_device(among)
    index, weights, y, logits = world.on_device()
    close, rtol = (1e-4, 1e-3) if spoil else (1e-5, 1.3e-6)
    if spoil:  # of equals the lower id is the better, which they do not say by themselves
        logits = logits - close / 10 * torch.arange(rule.experts)
    chosen, limits = index.numpy().astype(np.int64), np.array(LIMITS, np.float32)
    lacking = (held.numpy()[chosen] == 0).sum(axis=1)
    met, expected = np.zeros((ROWS, MET)), torch.zeros(ROWS, rule.experts)
    for row in range(ROWS):  # together they would be given as many substitutes as the row that needs most
        one = slice(row, row + 1)
        rows = logits[one], chosen[one], weights[one].numpy()
        theirs = among_held(rule_of(world), *rows, held.numpy() != 0, limits[one], shared_by)
        met[row] = theirs.replaced[0], theirs.mass[0], lacking[row] - theirs.replaced[0]
        expected[one] = spread(rule, torch.from_numpy(theirs.index), torch.from_numpy(theirs.weights))
    np.testing.assert_allclose(among.met.cpu(), met, atol=close)
    assert 0 < met[:, 0].sum() < lacking.sum()
    ours = among.experts.cpu().long(), among.weights.cpu()
    torch.testing.assert_close(spread(rule, *ours), expected, rtol=rtol, atol=close)
    named = torch.zeros(ROWS, rule.experts).scatter_(1, ours[0], 1.0)
    assert torch.equal(named, (spread(rule, *ours) != 0).float()), "who is named again is somebody who computes"
    asked = spread(rule, torch.from_numpy(chosen), weights * y.norm(dim=1, keepdim=True))[:-1].sum(dim=0)
    torch.testing.assert_close(among.asked.cpu(), asked, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [1.0, 0.999])
@pytest.mark.parametrize(("rule", "spread_by"), [(RULES[0], 0.3), (SIX, 0.3), (EIGHT, 0.0)])
def test_two_answer_from_an_eighth_of_the_row_on(rule: Rule, spread_by: float, limit: float) -> None:
    world, width = World(rule, ""), widest(rule.top_k, 2)
    world.x, world.matrix = world.x[:1], world.matrix * np.float32(spread_by)
    index, weights, _, logits = world.on_device()
    logits = logits - 1e-6 * torch.arange(rule.experts)  # of equals the lower id is the better
    shares, counts = weights[0] / weights[0].sum(), set()
    for lost, mass in zip(index[0].tolist(), shares.tolist(), strict=True):
        held = torch.ones(rule.experts, dtype=torch.int32)
        held[lost] = 0
        among = Among(
            held=held.to(DEVICE), counted=torch.empty(1, rule.experts, device=DEVICE),
            limits=torch.full((1,), limit, device=DEVICE), num_rows=torch.ones(1, dtype=torch.int32, device=DEVICE),
            asked=torch.zeros(rule.experts, device=DEVICE), met=torch.zeros(1, MET, device=DEVICE),
            experts=torch.zeros(1, width, dtype=torch.int32, device=DEVICE),
            weights=torch.zeros(1, width, device=DEVICE), shared_by=2,
        )  # fmt: skip
        world.on_device(among)
        ours = spread(rule, among.experts.cpu().long(), among.weights.cpu())
        row = logits, index.numpy().astype(np.int64), weights.numpy(), held.numpy() != 0
        theirs = among_held(rule_of(world), *row, np.array([limit], np.float32), 2)
        expected = spread(rule, torch.from_numpy(theirs.index), torch.from_numpy(theirs.weights))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        assert int(among.met[0, 0]) == 1
        counts.add((mass < SHARED_FROM - 1e-4, ours.count_nonzero().item() - rule.top_k))
    assert counts == ({(False, 1)} if rule is EIGHT else {(True, 0), (False, 1)})


@pytest.mark.parametrize("rule", RULES[:2])
def test_where_fewer_are_held_than_a_token_needs_choices_stay(rule: Rule) -> None:
    world, width = World(rule, ""), widest(rule.top_k, 2)
    held = torch.zeros(rule.experts, dtype=torch.int32)
    held[: rule.top_k - 1] = 1
    rows = torch.full((ROWS + 1, width), -1, dtype=torch.int32, device=DEVICE)
    among = Among(
        held=held.to(DEVICE), counted=torch.empty(ROWS, rule.experts, device=DEVICE),
        limits=torch.ones(ROWS, device=DEVICE),
        num_rows=torch.tensor([ROWS], dtype=torch.int32, device=DEVICE),
        asked=torch.zeros(rule.experts, device=DEVICE), met=torch.ones(ROWS, MET, device=DEVICE),
        experts=rows[:ROWS], weights=torch.empty(ROWS, width, device=DEVICE), shared_by=2,
    )  # fmt: skip
    world.on_device(among)
    index, weights, _, _ = world.on_device()
    ours = spread(rule, among.experts.cpu().long(), among.weights.cpu())
    torch.testing.assert_close(ours, spread(rule, index.long(), weights))
    assert not among.met.any() and (rows[ROWS] == -1).all(), "nobody answers, and nothing is written beyond the rows"


@pytest.mark.parametrize("rule", [RULES[0], RULES[3]])
def test_a_lone_row_leaves_what_it_asks_for_whatever_was_there(rule: Rule) -> None:
    world, width = World(rule, ""), widest(rule.top_k, 2)
    world.x = world.x[:1]
    held = (torch.arange(rule.experts) % 2).int()
    among = Among(
        held=held.to(DEVICE), counted=torch.empty(1, rule.experts, device=DEVICE),
        limits=torch.ones(1, device=DEVICE), num_rows=torch.ones(1, dtype=torch.int32, device=DEVICE),
        asked=torch.full((rule.experts,), 7.0, device=DEVICE), met=torch.zeros(1, MET, device=DEVICE),
        experts=torch.zeros(1, width, dtype=torch.int32, device=DEVICE), weights=torch.zeros(1, width, device=DEVICE),
        shared_by=2,
    )  # fmt: skip
    world.on_device(among)
    index, weights, y, _ = world.on_device()
    asked = spread(rule, index.long(), weights * y.norm())[0]
    torch.testing.assert_close(among.asked.cpu(), asked, rtol=1e-5, atol=1e-6)
    assert int(among.met[0, 0]) == (held[index[0].long()] == 0).sum()


def spread(rule: Rule, index: Tensor, weights: Tensor) -> Tensor:
    """Weights `[R, experts]`, whatever the order in which experts are named, and how often."""
    return torch.zeros(len(index), rule.experts).scatter_add_(1, index, weights)


def rule_of(world: World) -> Select:
    """`RouterAdapter.select` of the world's router."""
    rule, favour = world.rule, world.favour
    if rule.scores == Scores.CHOSEN:
        return lambda logits, mask, top_k: TopKSoftmax(top_k)(logits, mask)
    score = sigmoid_scores if rule.scores == Scores.SIGMOID else softmax_scores
    groups = Groups(rule.groups, rule.groups_kept, rule.group_best) if rule.groups else None
    bias = None if favour is None else (lambda: torch.from_numpy(favour))
    normalise = share if rule.shares else None
    return lambda logits, mask, top_k: ScoreTopK(top_k, score, normalise, rule.scale, bias, groups)(logits, mask)


def test_what_cannot_be_is_refused() -> None:
    eight = DeviceMatrix.of("float32", torch.zeros(8, 32), 8, 32, None, DEVICE)
    with pytest.raises(ValueError, match="8 experts are not 3 equal groups"):
        RouterLayout(eight, None, 2, Scores.SOFTMAX, 3, 1, 1, False, 0.0, 1.0)
    with pytest.raises(ValueError, match="are not selected here"):
        RouterLayout(eight, None, 2, Scores.LOGITS, 0, 0, 0, False, 0.0, 1.0)
