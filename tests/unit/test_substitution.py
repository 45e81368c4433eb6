"""Who answers for a choice that is not held, and with what weight."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from expertd_engine.model.substitution import Bools, Floats, Ids, one_row, replaced_choices, widened, with_substitutes

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


@given(steps(), st.integers(1, 3))
def test_what_is_held_keeps_its_weight_and_substitutes_share_the_rest(
    step: tuple[Ids, Floats, Bools, Ids, Floats], shared_by: int
) -> None:
    chosen, weights, replaced, others, scores = step
    index, gates = with_substitutes(chosen, weights, replaced, others, scores, shared_by)
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
        assert sorted(serving) == sorted(ranked[: shared_by * int(replaced[row].sum())])
        np.testing.assert_allclose(sum(got.values()), weights[row].sum(), rtol=1e-5)


def test_substitutes_share_in_proportion_to_how_the_router_likes_them() -> None:
    index, gates = with_substitutes(
        ids((5, 1, 2)), floats((0.5, 0.3, 0.2)), np.array([[True, False, False]]), ids((0, 3, 4)), floats((1, 3, 0)), 2
    )
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


@given(
    st.permutations(range(EXPERTS)), st.lists(st.integers(-20, 20), min_size=EXPERTS, max_size=EXPERTS, unique=True),
    st.integers(1, 2**K - 1), st.integers(K, EXPERTS), st.integers(1, 3),
)  # fmt: skip
def test_one_row_is_as_many_rows(order: list[int], tenths: list[int], lost: int, num_held: int, shared_by: int) -> None:
    logits = (np.array(tenths) / 10).astype(np.float32)
    replaced = np.array([bool(lost >> i & 1) for i in range(K)])
    chosen, weights = np.array(order[:K], np.int64), np.array([0.5, 0.3, 0.2], np.float32)
    held = np.zeros(EXPERTS, bool)
    held[[e for e, is_lost in zip(order[:K], replaced, strict=True) if not is_lost]] = True
    held[order[K:][:num_held]] = True
    others = sorted((e for e in order[K:] if held[e]), key=lambda e: -logits[e])[:K]
    filler = [order[0]] * (K - len(others))
    scores = floats((*np.exp(logits[others]), *[0.0] * len(filler)))
    many = with_substitutes(
        chosen[None],
        weights[None],
        replaced[None],
        ids((*others, *filler)),
        scores,
        min(shared_by, K // replaced.sum()),
    )
    one = one_row(chosen, weights, replaced, logits, held, min(shared_by, K // int(replaced.sum())))
    assert many[0].tolist() == one[0].tolist()
    np.testing.assert_allclose(many[1], one[1], rtol=1e-5)
