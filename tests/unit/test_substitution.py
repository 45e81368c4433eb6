"""Who answers for a choice that is not held, and with what weight."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertd_engine.model.among_held import among_held
from expertd_engine.model.held_run import NativeSubstitution
from expertd_engine.model.native_abi import BlockCalls, Router, Scores
from expertd_engine.model.router_rules import (
    Groups,
    Rule,
    ScoreTopK,
    TopKSoftmax,
    share,
    sigmoid_scores,
    softmax_scores,
)
from expertd_engine.model.substitution import (
    SHARED_FROM,
    Bools,
    Floats,
    Ids,
    Substituted,
    num_substitutes,
    replaced_choices,
    widened,
    widest,
    with_substitutes,
)
from support.kernels import native_pool, needs_kernels

EXPERTS, K = 8, 3


def ids(*rows: tuple[int, ...]) -> Ids:
    return np.array(rows, np.int64)


def floats(*rows: tuple[float, ...]) -> Floats:
    return np.array(rows, np.float32)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Ids, Floats, Bools, Ids, Floats]:
    """Choices and weights, which are replaced, and others in any order with scores, of which enough are above 0."""
    rows = draw(st.integers(1, 4))
    chosen, replaced, others, scores = [], [], [], []
    for _ in range(rows):
        order = draw(st.permutations(range(EXPERTS)))
        lost = draw(st.lists(st.booleans(), min_size=K, max_size=K))
        useful = draw(st.integers(sum(lost), K))
        chosen.append(tuple(order[:K]))
        replaced.append(lost)
        others.append(tuple(order[K : 2 * K]))
        scores.append(tuple(draw(st.permutations([*range(1, useful + 1), *[0] * (K - useful)]))))
    weights = draw(st.lists(st.integers(1, 9), min_size=K * rows, max_size=K * rows))
    return ids(*chosen), floats(tuple(weights)).reshape(rows, K), np.array(replaced), ids(*others), floats(*scores)


@given(steps(), st.integers(0, 2))
def test_what_is_held_keeps_its_weight_and_substitutes_share_the_rest(
    step: tuple[Ids, Floats, Bools, Ids, Floats], more: int
) -> None:
    chosen, weights, replaced, others, scores = step
    wanted = np.where(replaced.any(axis=1), replaced.sum(axis=1) + more, 0)
    index, gates = with_substitutes(chosen, weights, replaced, others, scores, wanted)
    assert index.shape == gates.shape and index.shape[1] >= K
    for row in range(len(chosen)):
        got = dict.fromkeys(index[row].tolist(), 0.0)
        for expert, gate in zip(index[row].tolist(), gates[row].tolist(), strict=True):
            got[expert] += gate
        own = zip(chosen[row].tolist(), weights[row].tolist(), replaced[row], strict=True)
        stays = {expert: weight for expert, weight, is_lost in own if not is_lost}
        assert {e: got[e] for e in stays} == stays
        serving = {e: w for e, w in got.items() if e not in stays and w > 0}
        ranked = [e for _, e in sorted(zip(-scores[row], others[row].tolist(), strict=True)) if _ < 0]
        assert sorted(serving) == sorted(ranked[: wanted[row]])
        np.testing.assert_allclose(sum(got.values()), weights[row].sum(), rtol=1e-5)


def test_two_answer_for_one_until_so_many_do_anyway() -> None:
    lost, heavy, light = np.arange(9), np.full(9, 0.2, np.float32), np.full(9, 0.05, np.float32)
    assert num_substitutes(lost, heavy, 8, 2).tolist() == [0, 2, 4, 6, 6, 6, 6, 7, 8]
    assert num_substitutes(lost, heavy, 8, 1).tolist() == lost.tolist()
    assert num_substitutes(lost, light, 8, 2).tolist() == lost.tolist()
    assert [widest(top_k, 2) for top_k in (1, 2, 4, 8)] == [1, 2, 5, 11]


def test_substitutes_share_in_proportion_to_how_the_router_likes_them() -> None:
    row = ids((5, 1, 2)), floats((0.5, 0.3, 0.2)), np.array([[True, False, False]])
    index, gates = with_substitutes(*row, ids((0, 3, 4)), floats((1, 3, 0)), np.array([2]))
    assert index.tolist() == [[1, 2, 3, 0]]
    np.testing.assert_allclose(gates, [[0.3, 0.2, 0.375, 0.125]], rtol=1e-6)


def test_a_row_with_fewer_experts_names_its_first_again_for_nothing() -> None:
    index, gates = widened(ids((4, 2, 0)), floats((0.5, 0.3, 0.2)), 5)
    assert index.tolist() == [[4, 2, 0, 4, 4]]
    np.testing.assert_allclose(gates, [[0.5, 0.3, 0.2, 0, 0]])


def test_the_lightest_that_fit_the_limit_are_replaced() -> None:
    weights = floats((0.5, 0.3, 0.2), (0.5, 0.3, 0.2), (0.5, 0.3, 0.2), (0.5, 0.3, 0.2))
    lacking = np.array([[True] * 3, [True] * 3, [True, False, True], [True] * 3])
    replaced, mass = replaced_choices(weights, lacking, np.array([0.5, 0.19, 0.6, 1.0], np.float32))
    assert replaced.tolist() == [[False, True, True], [False] * 3, [False, False, True], [True] * 3]
    np.testing.assert_allclose(mass, [0.5, 0, 0.2, 1], rtol=1e-6)


BIAS: Floats = np.linspace(0.3, 0, EXPERTS, dtype=np.float32)
ROUTERS: dict[str, tuple[Rule, dict[str, Any]]] = {
    "softmax": (ScoreTopK(K, softmax_scores), {"scores": Scores.SOFTMAX}),
    "shares": (ScoreTopK(K, softmax_scores, share, 2.5), {"scores": Scores.SOFTMAX, "shares": 1, "scale": 2.5}),
    "chosen": (TopKSoftmax(K), {"scores": Scores.CHOSEN}),
    "sigmoid": (ScoreTopK(K, sigmoid_scores, bias=lambda: torch.from_numpy(BIAS)), {"scores": Scores.SIGMOID}),
    "groups": (
        ScoreTopK(K, sigmoid_scores, share, bias=lambda: torch.from_numpy(BIAS), groups=Groups(4, 2, 2)),
        {"scores": Scores.SIGMOID, "shares": 1, "groups": 4, "groups_kept": 2, "group_best": 2},
    ),
}


@needs_kernels
@pytest.mark.parametrize("kind", ROUTERS)
def test_native_code_has_the_same_rule(kind: str) -> None:
    rule, fields = ROUTERS[kind]
    router = Router(experts=EXPERTS, top_k=K, **{"scale": 1.0, **fields})
    router.bias = BIAS.ctypes.data if isinstance(rule, ScoreTopK) and rule.bias is not None else None
    rng = np.random.default_rng(7)
    with native_pool(2) as pool:
        native = NativeSubstitution(BlockCalls(pool.library).substitute, pool, router)
        for num_held in range(K, EXPERTS + 1):
            logits = torch.from_numpy(rng.normal(size=(9, EXPERTS)).astype(np.float32))
            chosen, weights = (found.numpy() for found in rule(logits, None))
            held = np.zeros(EXPERTS, bool)
            held[rng.permutation(EXPERTS)[:num_held]] = True
            limits = np.array([1, 0.5, 0.2, 0, 1, 0.7, 0.4, 0.3, 1], np.float32)
            for shared_by in (1, 2, 3):
                ours = native(logits, chosen, weights, held, limits, shared_by)
                for row in range(len(logits)):
                    at = slice(row, row + 1)
                    theirs = among_held(
                        partial(_select, rule), logits[at], chosen[at], weights[at], held, limits[at], shared_by
                    )
                    assert ours.replaced[row] == theirs.replaced[0]
                    assert ours.mass[row] == pytest.approx(theirs.mass[0], rel=1e-5)
                    np.testing.assert_allclose(_dense(ours)[at], _dense(theirs), rtol=1e-5, atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_two_answer_from_an_eighth_of_the_row_on(limit: float) -> None:
    """In both twins: what is short of the bound by a rounding alone is at it."""
    rule, fields = ROUTERS["softmax"]
    router = Router(experts=EXPERTS, top_k=K, scale=1.0, **fields)
    logits, chosen = torch.arange(EXPERTS, 0, -1.0)[None], np.arange(K)[None]
    held = np.ones(EXPERTS, bool)
    held[K - 1] = False
    with native_pool(1) as pool:
        native = NativeSubstitution(BlockCalls(pool.library).substitute, pool, router)
        for total in (1.0, 0.3, 7.0):  # whatever weights add up to
            for short, serving in ((0.05, 1), (1e-5, 1), (2e-7, 2), (0.0, 2), (-0.05, 2)):
                lost = SHARED_FROM - short
                row = (logits, chosen, total * floats((0.8 - lost, 0.2, lost)))
                limits = np.array([limit], np.float32)
                for found in (native(*row, held, limits, 2), among_held(partial(_select, rule), *row, held, limits, 2)):
                    assert found.mass[0] == pytest.approx(lost, rel=1e-5)
                    assert np.count_nonzero(_dense(found)) == K - 1 + serving


def _select(rule: Rule, logits: torch.Tensor, mask: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(rule, ScoreTopK | TopKSoftmax)
    return replace(rule, top_k=top_k)(logits, mask)


def _dense(found: Substituted) -> Floats:
    """Weights by expert, `[T, E]`."""
    dense = np.zeros((len(found.index), EXPERTS), np.float32)
    for row in range(len(dense)):
        np.add.at(dense[row], found.index[row], found.weights[row])
    return dense


@needs_kernels
def test_native_code_refuses_what_does_not_fit() -> None:
    with native_pool(1) as pool:
        native = NativeSubstitution(
            BlockCalls(pool.library).substitute, pool, Router(experts=EXPERTS, top_k=K, scores=Scores.SOFTMAX)
        )
        few = np.array([True] * (K - 1) + [False] * (EXPERTS - K + 1))
        row = (torch.zeros(1, EXPERTS), ids((0, 1, 2)), floats((0.5, 0.3, 0.2)))
        with pytest.raises(ValueError, match=f"{K - 1} experts are held; a row needs {K}"):
            native(*row, few, floats((1,))[0], 1)
        with pytest.raises(ValueError, match="shared_by is 0; allowed are 1 and more"):
            native(*row, ~few, floats((1,))[0], 0)
