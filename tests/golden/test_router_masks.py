"""Router adapters under a mask: who is chosen then, and with what weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expertd_engine.model.router_kinds import RouterAdapter
from expertd_engine.model.router_rules import RouterKind
from support.routers import EVERY, ROWS, generator, hidden_for, last_adapter

SUM_TO = {
    "mixtral": 1.0,
    "qwen2_moe": 1.0,
    "qwen3_moe": 1.0,
    "flex_olmo": 1.0,
    "gpt_oss": 1.0,
    "granitemoe": 1.0,
    "ernie4_5_moe": 1.0,
    "deepseek_v3": 2.5,
    "glm4_moe": 1.5,
    "minimax_m2": 1.0,
    "afmoe": 1.5,
}
UNNORMALISED_SCALE = {"olmoe": 1.0, "deepseek_v2": 1.7}


def random_mask(adapter: RouterAdapter, rows: int, allowed: int, seed: int) -> Tensor:
    """A mask `[rows, E]` with exactly `allowed` experts in each row."""
    order = torch.rand(rows, adapter.num_experts, generator=generator(seed)).argsort(dim=-1)
    return order < allowed


def per_expert(adapter: RouterAdapter, index: Tensor, weights: Tensor) -> Tensor:
    """Weights `[T, E]`, zero where an expert was not chosen."""
    return torch.zeros(index.shape[0], adapter.num_experts, dtype=weights.dtype).scatter(1, index, weights)


@pytest.mark.parametrize("family", EVERY)
def test_full_mask_is_no_mask(family: str) -> None:
    adapter = last_adapter(family)
    logits = adapter.logits(hidden_for(adapter))
    index, weights = adapter.select(logits)
    for shape in ((adapter.num_experts,), (ROWS, adapter.num_experts)):
        masked_index, masked_weights = adapter.select(logits, torch.ones(shape, dtype=torch.bool))
        assert torch.equal(masked_index, index)
        assert torch.equal(masked_weights, weights)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_masked_experts_are_never_chosen(family: str, spare: int) -> None:
    adapter = last_adapter(family)
    logits = adapter.logits(hidden_for(adapter))
    mask = random_mask(adapter, ROWS, adapter.top_k + spare, seed=spare)
    index, weights = adapter.select(logits, mask)
    assert index.shape == weights.shape == (ROWS, adapter.top_k)
    assert bool(mask.gather(1, index).all())
    assert all(len(set(row)) == adapter.top_k for row in index.tolist())
    assert bool(torch.isfinite(weights).all()) and bool((weights >= 0).all())


@pytest.mark.parametrize("family", EVERY)
def test_one_mask_for_all_rows_equals_a_mask_per_row(family: str) -> None:
    adapter = last_adapter(family)
    logits = adapter.logits(hidden_for(adapter))
    mask = random_mask(adapter, 1, adapter.top_k + 1, seed=5)[0]
    for shared, expanded in zip(
        adapter.select(logits, mask), adapter.select(logits, mask.expand(ROWS, -1)), strict=True
    ):
        assert torch.equal(shared, expanded)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "gpt_oss", "granitemoe", "phimoe"]
)
def test_masking_equals_an_impossible_logit(family: str) -> None:
    """Where weights are normalised over the candidates, a masked expert is as good as one the router never wants."""
    adapter = last_adapter(family)
    logits = adapter.logits(hidden_for(adapter))
    mask = random_mask(adapter, ROWS, adapter.top_k + 1, seed=6)
    index, weights = adapter.select(logits, mask)
    wanted_index, wanted_weights = adapter.select(torch.where(mask, logits, -1e9))
    assert torch.equal(index, wanted_index)
    torch.testing.assert_close(weights, wanted_weights)


@pytest.mark.parametrize("family", SUM_TO)
def test_normalised_weights_keep_their_sum_under_a_mask(family: str) -> None:
    adapter = last_adapter(family)
    logits = adapter.logits(hidden_for(adapter))
    for mask in (None, random_mask(adapter, ROWS, adapter.top_k + 2, seed=7)):
        total = adapter.select(logits, mask)[1].sum(dim=-1)
        torch.testing.assert_close(total, torch.full_like(total, SUM_TO[family]))


@pytest.mark.parametrize("family", UNNORMALISED_SCALE)
def test_unnormalised_weights_stay_the_raw_scores_under_a_mask(family: str) -> None:
    adapter = last_adapter(family)
    logits = adapter.logits(hidden_for(adapter))
    scores = UNNORMALISED_SCALE[family] * logits.softmax(dim=-1)
    for mask in (None, random_mask(adapter, ROWS, adapter.top_k + 2, seed=8)):
        index, weights = adapter.select(logits, mask)
        torch.testing.assert_close(weights, scores.gather(1, index))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "minimax_m2", "afmoe"])
def test_selection_bias_moves_the_choice_but_not_the_weights(family: str) -> None:
    adapter = last_adapter(family)
    logits = adapter.logits(hidden_for(adapter))
    index, weights = adapter.select(logits, mask := random_mask(adapter, ROWS, adapter.top_k + 2, seed=9))
    scores = logits.softmax(dim=-1) if adapter.kind == RouterKind.SOFTMAX_TOPK else logits.sigmoid()
    shares = scores.gather(1, index)
    torch.testing.assert_close(weights, SUM_TO[family] * shares / shares.sum(dim=-1, keepdim=True))
    by_score = scores.masked_fill(~mask, -1.0).topk(adapter.top_k, dim=-1)[1]
    assert not torch.equal(by_score.sort(dim=-1)[0], index.sort(dim=-1)[0])


@pytest.mark.parametrize(
    ("family", "groups", "kept"), [("deepseek_v2", 3, 2), ("deepseek_v3", 4, 2), ("glm4_moe", 3, 2)]
)
def test_groups_hold_while_they_have_enough_allowed_experts(family: str, groups: int, kept: int) -> None:
    adapter = last_adapter(family)
    size = adapter.num_experts // groups
    mask = torch.arange(adapter.num_experts) % size != 0  # one expert of each group is away
    index, _ = adapter.select(adapter.logits(hidden_for(adapter)), mask)
    used = [len({expert // size for expert in row}) for row in index.tolist()]
    assert max(used) == kept


def test_groups_give_way_where_they_have_too_few_allowed_experts() -> None:
    adapter = last_adapter("deepseek_v3")
    mask = torch.arange(adapter.num_experts) % 3 == 0  # one expert in each of four groups; two groups may be used
    index, _ = adapter.select(adapter.logits(hidden_for(adapter)), mask)
    assert all(sorted(row) == [0, 3, 6, 9] for row in index.tolist())


def test_a_group_with_one_allowed_expert_can_still_be_among_the_best() -> None:
    adapter = last_adapter("deepseek_v3")
    logits = adapter.logits(hidden_for(adapter))
    logits[:, 0] = 20.0
    logits[:, 3:] -= 4.0
    mask = torch.ones(adapter.num_experts, dtype=torch.bool)
    mask[1:3] = False  # expert 0 is alone in its group of three
    index, _ = adapter.select(logits, mask)
    assert all(0 in row for row in index.tolist())


def test_a_mask_of_the_wrong_form_is_refused() -> None:
    adapter = last_adapter("mixtral")
    logits = adapter.logits(hidden_for(adapter))
    with pytest.raises(ValueError, match=r"dtype torch\.float32; it must be torch\.bool"):
        adapter.select(logits, torch.ones(8))
    with pytest.raises(ValueError, match=r"shape \[7\]; it must be \[8\] or \[48, 8\]"):
        adapter.select(logits, torch.ones(7, dtype=torch.bool))
    with pytest.raises(ValueError, match="allows 1 experts; at least 2"):
        adapter.select(logits, torch.arange(8) == 3)
