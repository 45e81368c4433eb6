"""Where tokens go by what they are: what is learned of routers that look at embeddings, and the file it lies in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expertd_engine.errors import StoreError
from expertd_engine.experts.events import ExpertId, Load, Priority
from expertd_engine.experts.held_table import HeldTable
from expertd_engine.model.token_routes import MapFit, TokenMap, TokenRoutes, read_token_map, write_token_map
from support.kernels import native_pool

VOCABULARY, HIDDEN, TOP_K = 50, 12, 2
EXPERTS = [8, 6]


@pytest.fixture(scope="module")
def learned() -> tuple[TokenMap, np.ndarray]:
    """A map, and the logits that it was learned from."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
    directions = table / np.linalg.norm(table, axis=1, keepdims=True)
    logits = np.stack([5 * directions @ rng.normal(size=(HIDDEN, max(EXPERTS))) for _ in EXPERTS], axis=1)
    logits[:, 1, EXPERTS[1] :] = 0  # as the recorder pads what a layer does not have
    fit = MapFit(lambda ids: table[list(ids)], EXPERTS)
    for ids in np.split(rng.integers(VOCABULARY, size=600), 6):
        fit.add(ids.tolist(), logits[ids].astype(np.float32), np.ones((len(EXPERTS), max(EXPERTS)), np.float32))
    return fit.fit(VOCABULARY), logits


def test_the_experts_that_routers_choose_are_expected(learned: tuple[TokenMap, np.ndarray]) -> None:
    numbers, logits = learned
    routes = TokenRoutes(numbers, TOP_K)
    for token in range(VOCABULARY):
        expected = routes.expected([token])
        for layer, count in enumerate(EXPERTS):
            chosen = np.argsort(-logits[token, layer, :count])[:TOP_K]
            assert np.all(expected[layer, chosen] > 0) and expected[layer].argmax() == chosen[0]
            assert np.all(expected[layer, count:] == 0) and np.count_nonzero(expected[layer]) == 3


def test_many_tokens_share_the_weight(learned: tuple[TokenMap, np.ndarray]) -> None:
    routes = TokenRoutes(learned[0], TOP_K)
    both = routes.expected([3, 7])
    assert both.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert both == pytest.approx((routes.expected([3]) + routes.expected([7])) / 2)


def test_the_pool_answers_as_numpy_does(learned: tuple[TokenMap, np.ndarray]) -> None:
    with native_pool(1) as pool:
        native, plain = TokenRoutes(learned[0], TOP_K, pool.library), TokenRoutes(learned[0], TOP_K)
        for tokens in ([3], [3, 7, 11], range(VOCABULARY)):
            assert native.expected(tokens) == pytest.approx(plain.expected(tokens), abs=1e-5)


def test_a_map_is_of_one_store(learned: tuple[TokenMap, np.ndarray], tmp_path: Path) -> None:
    write_token_map(tmp_path, learned[0], "this")
    assert np.array_equal(read_token_map(tmp_path, "this").up, learned[0].up)
    with pytest.raises(StoreError, match="another store"):
        read_token_map(tmp_path, "that")


def test_what_is_expected_shows_as_soon_as_it_is_read_and_nothing_else_does() -> None:
    table = HeldTable([4, 3])
    table.granted(ExpertId(0, 1), 7)
    table.expect(ExpertId(0, 2))
    for expert in (2, 3):
        table.loaded(Load(1, ExpertId(0, expert), 9, Priority.DEMAND))
    assert table.masks[0].tolist() == table.held[0].tolist() == table.taken[0].tolist() == [False, True, True, False]
    assert table.shown[0].tolist() == [False, True, False, False] and not table.held[1].any()
    assert table.slots[0][[1, 2]].tolist() == [7, 9]
    table.granted(ExpertId(0, 2), 9)
    table.gone(ExpertId(0, 1))
    assert table.masks[0].tolist() == table.shown[0].tolist() == [False, False, True, False]
    table.gone(ExpertId(0, 2))
    assert not table.told.any() and not table.taken.any()
    table.loaded(Load(2, ExpertId(0, 2), 9, Priority.DEMAND))
    assert not table.held.any(), "nobody asked for it"
