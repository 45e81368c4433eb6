"""Router adapters against the router modules of transformers: bit-equal without a mask, lawful under one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from expertd_engine.families import find_experts
from expertd_engine.model.router_kinds import RouterAdapter, adapt_router, check_adapter, router_kind_of
from expertd_engine.model.router_rules import RouterKind
from support.tiny_families import COMMON, FAMILIES, OTHERS, make_checkpoint, make_model, randomise

ROWS = 48

KINDS = {
    "mixtral": RouterKind.SOFTMAX_TOPK,
    "qwen2_moe": RouterKind.SOFTMAX_TOPK,
    "qwen3_moe": RouterKind.SOFTMAX_TOPK,
    "olmoe": RouterKind.SOFTMAX_TOPK,
    "flex_olmo": RouterKind.SOFTMAX_TOPK,
    "deepseek_v2": RouterKind.SOFTMAX_TOPK,
    "deepseek_v3": RouterKind.SIGMOID_GROUPED,
    "gpt_oss": RouterKind.TOPK_SOFTMAX,
    "granitemoe": RouterKind.TOPK_SOFTMAX,
    "phimoe": RouterKind.SPARSEMIXER,
    "glm4_moe": RouterKind.SIGMOID_GROUPED,
    "ernie4_5_moe": RouterKind.SOFTMAX_TOPK,
    "hunyuan_v1_moe": RouterKind.SOFTMAX_TOPK,
    "mellum": RouterKind.SOFTMAX_TOPK,
    "granitemoeshared": RouterKind.TOPK_SOFTMAX,
    "cohere2_moe": RouterKind.TOPK_SOFTMAX,
    "minimax_m2": RouterKind.SIGMOID_GROUPED,
    "exaone_moe": RouterKind.SIGMOID_GROUPED,
    "solar_open": RouterKind.SIGMOID_GROUPED,
    "afmoe": RouterKind.SIGMOID_GROUPED,
    "dots1": RouterKind.SIGMOID_GROUPED,
    "glm4_moe_lite": RouterKind.SIGMOID_GROUPED,
}
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

EVERY = [*FAMILIES, *OTHERS]


def _other_model(family: str, **changes: Any) -> nn.Module:
    config = AutoConfig.for_model(family, **{**COMMON, **OTHERS[family], **changes})
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed=1)
    return model


@cache
def _model(family: str) -> nn.Module:
    return _other_model(family) if family in OTHERS else make_model(family, seed=1)


def _experts(model: nn.Module) -> dict[str, nn.Module]:
    return dict(find_experts(model))


def _adapters(model: nn.Module) -> list[RouterAdapter]:
    adapters = [adapt_router(model, name) for name in _experts(model)]
    assert adapters
    return [adapter for adapter in adapters if adapter is not None]


def _last(family: str) -> RouterAdapter:
    return _adapters(_model(family))[-1]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _hidden(adapter: RouterAdapter, rows: int = ROWS, seed: int = 2) -> Tensor:
    return torch.randn(rows, adapter.hidden_size, generator=_generator(seed))


def _random_mask(adapter: RouterAdapter, rows: int, allowed: int, seed: int) -> Tensor:
    """A mask `[rows, E]` with exactly `allowed` experts in each row."""
    order = torch.rand(rows, adapter.num_experts, generator=_generator(seed)).argsort(dim=-1)
    return order < allowed


def _per_expert(adapter: RouterAdapter, index: Tensor, weights: Tensor) -> Tensor:
    """Weights `[T, E]`, zero where an expert was not chosen."""
    return torch.zeros(index.shape[0], adapter.num_experts, dtype=weights.dtype).scatter(1, index, weights)


@pytest.mark.parametrize("family", EVERY)
def test_kind_is_declared(family: str) -> None:
    model = _model(family)
    assert router_kind_of(model) == KINDS[family]
    assert {adapter.kind for adapter in _adapters(model)} == {KINDS[family]}
    assert len(_adapters(model)) == len(_experts(model))


@pytest.mark.parametrize("family", EVERY)
def test_bit_equal_to_the_module_in_float32(family: str) -> None:
    assert all(check_adapter(adapter, _generator(3)) for adapter in _adapters(_model(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_bit_equal_to_the_module_in_bfloat16_as_loaded(family: str, tmp_path: Any) -> None:
    make_checkpoint(family, tmp_path, seed=1, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(check_adapter(adapter, _generator(3)) for adapter in _adapters(model))


@pytest.mark.parametrize("family", OTHERS)
def test_bit_equal_to_the_module_in_bfloat16(family: str) -> None:
    adapters = _adapters(_other_model(family).to(torch.bfloat16))
    assert all(check_adapter(adapter, _generator(3)) for adapter in adapters)


@pytest.mark.parametrize("family", EVERY)
def test_experts_receive_what_the_adapter_selects(family: str) -> None:
    """In a whole forward pass, from the hidden states that the experts themselves are given."""
    model = _model(family)
    received: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def record(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, arguments: received.update({name: arguments})

    hooks = [module.register_forward_pre_hook(record(name)) for name, module in _experts(model).items()]
    with torch.inference_mode():
        model(torch.arange(24)[None])
    for hook in hooks:
        hook.remove()
    for name, (hidden, index, weights) in received.items():
        adapter = adapt_router(model, name)
        assert adapter is not None
        with torch.inference_mode():
            own_index, own_weights = adapter.select(adapter.logits(hidden))
        assert torch.equal(own_index, index)
        assert torch.equal(own_weights, weights)
    assert received.keys() == _experts(model).keys()


@pytest.mark.parametrize("family", EVERY)
def test_full_mask_is_no_mask(family: str) -> None:
    adapter = _last(family)
    logits = adapter.logits(_hidden(adapter))
    index, weights = adapter.select(logits)
    for shape in ((adapter.num_experts,), (ROWS, adapter.num_experts)):
        masked_index, masked_weights = adapter.select(logits, torch.ones(shape, dtype=torch.bool))
        assert torch.equal(masked_index, index)
        assert torch.equal(masked_weights, weights)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_masked_experts_are_never_chosen(family: str, spare: int) -> None:
    adapter = _last(family)
    logits = adapter.logits(_hidden(adapter))
    mask = _random_mask(adapter, ROWS, adapter.top_k + spare, seed=spare)
    index, weights = adapter.select(logits, mask)
    assert index.shape == weights.shape == (ROWS, adapter.top_k)
    assert bool(mask.gather(1, index).all())
    assert all(len(set(row)) == adapter.top_k for row in index.tolist())
    assert bool(torch.isfinite(weights).all()) and bool((weights >= 0).all())


@pytest.mark.parametrize("family", EVERY)
def test_one_mask_for_all_rows_equals_a_mask_per_row(family: str) -> None:
    adapter = _last(family)
    logits = adapter.logits(_hidden(adapter))
    mask = _random_mask(adapter, 1, adapter.top_k + 1, seed=5)[0]
    for shared, expanded in zip(
        adapter.select(logits, mask), adapter.select(logits, mask.expand(ROWS, -1)), strict=True
    ):
        assert torch.equal(shared, expanded)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "gpt_oss", "granitemoe", "phimoe"]
)
def test_masking_equals_an_impossible_logit(family: str) -> None:
    """Where weights are normalised over the candidates, a masked expert is as good as one the router never wants."""
    adapter = _last(family)
    logits = adapter.logits(_hidden(adapter))
    mask = _random_mask(adapter, ROWS, adapter.top_k + 1, seed=6)
    index, weights = adapter.select(logits, mask)
    wanted_index, wanted_weights = adapter.select(torch.where(mask, logits, -1e9))
    assert torch.equal(index, wanted_index)
    torch.testing.assert_close(weights, wanted_weights)


@pytest.mark.parametrize("family", SUM_TO)
def test_normalised_weights_keep_their_sum_under_a_mask(family: str) -> None:
    adapter = _last(family)
    logits = adapter.logits(_hidden(adapter))
    for mask in (None, _random_mask(adapter, ROWS, adapter.top_k + 2, seed=7)):
        total = adapter.select(logits, mask)[1].sum(dim=-1)
        torch.testing.assert_close(total, torch.full_like(total, SUM_TO[family]))


@pytest.mark.parametrize("family", UNNORMALISED_SCALE)
def test_unnormalised_weights_stay_the_raw_scores_under_a_mask(family: str) -> None:
    adapter = _last(family)
    logits = adapter.logits(_hidden(adapter))
    scores = UNNORMALISED_SCALE[family] * logits.softmax(dim=-1)
    for mask in (None, _random_mask(adapter, ROWS, adapter.top_k + 2, seed=8)):
        index, weights = adapter.select(logits, mask)
        torch.testing.assert_close(weights, scores.gather(1, index))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "minimax_m2", "afmoe"])
def test_selection_bias_moves_the_choice_but_not_the_weights(family: str) -> None:
    adapter = _last(family)
    logits = adapter.logits(_hidden(adapter))
    index, weights = adapter.select(logits, mask := _random_mask(adapter, ROWS, adapter.top_k + 2, seed=9))
    scores = logits.softmax(dim=-1) if adapter.kind == RouterKind.SOFTMAX_TOPK else logits.sigmoid()
    shares = scores.gather(1, index)
    torch.testing.assert_close(weights, SUM_TO[family] * shares / shares.sum(dim=-1, keepdim=True))
    by_score = scores.masked_fill(~mask, -1.0).topk(adapter.top_k, dim=-1)[1]
    assert not torch.equal(by_score.sort(dim=-1)[0], index.sort(dim=-1)[0])


@pytest.mark.parametrize(
    ("family", "groups", "kept"), [("deepseek_v2", 3, 2), ("deepseek_v3", 4, 2), ("glm4_moe", 3, 2)]
)
def test_groups_hold_while_they_have_enough_allowed_experts(family: str, groups: int, kept: int) -> None:
    adapter = _last(family)
    size = adapter.num_experts // groups
    mask = torch.arange(adapter.num_experts) % size != 0  # one expert of each group is away
    index, _ = adapter.select(adapter.logits(_hidden(adapter)), mask)
    used = [len({expert // size for expert in row}) for row in index.tolist()]
    assert max(used) == kept


def test_groups_give_way_where_they_have_too_few_allowed_experts() -> None:
    adapter = _last("deepseek_v3")
    mask = torch.arange(adapter.num_experts) % 3 == 0  # one expert in each of four groups; two groups may be used
    index, _ = adapter.select(adapter.logits(_hidden(adapter)), mask)
    assert all(sorted(row) == [0, 3, 6, 9] for row in index.tolist())


def test_a_group_with_one_allowed_expert_can_still_be_among_the_best() -> None:
    adapter = _last("deepseek_v3")
    logits = adapter.logits(_hidden(adapter))
    logits[:, 0] = 20.0
    logits[:, 3:] -= 4.0
    mask = torch.ones(adapter.num_experts, dtype=torch.bool)
    mask[1:3] = False  # expert 0 is alone in its group of three
    index, _ = adapter.select(logits, mask)
    assert all(0 in row for row in index.tolist())


def test_a_mask_of_the_wrong_form_is_refused() -> None:
    adapter = _last("mixtral")
    logits = adapter.logits(_hidden(adapter))
    with pytest.raises(ValueError, match=r"dtype torch\.float32; it must be torch\.bool"):
        adapter.select(logits, torch.ones(8))
    with pytest.raises(ValueError, match=r"shape \[7\]; it must be \[8\] or \[48, 8\]"):
        adapter.select(logits, torch.ones(7, dtype=torch.bool))
    with pytest.raises(ValueError, match="allows 1 experts; at least 2"):
        adapter.select(logits, torch.arange(8) == 3)


@pytest.mark.parametrize(
    ("family", "attribute", "value"),
    [
        ("qwen3_moe", "norm_topk_prob", False),
        ("deepseek_v3", "routed_scaling_factor", 1.0),
        ("deepseek_v3", "topk_group", 1),
        ("phimoe", "router_jitter_noise", 0.01),
        ("granitemoe", "top_k", 2),
    ],
)
def test_check_sees_a_module_that_acts_otherwise(family: str, attribute: str, value: object) -> None:
    adapter = _adapters(make_model(family, seed=1))[0]
    assert check_adapter(adapter, _generator(3))
    setattr(adapter.module, attribute, value)
    assert not check_adapter(adapter, _generator(3))


def test_check_refuses_a_module_in_training_mode() -> None:
    adapter = _adapters(make_model("phimoe", seed=1).train())[0]
    with pytest.raises(ValueError, match=r"training mode; call eval\(\)"):
        check_adapter(adapter, _generator(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_made_on_meta_sees_weights_loaded_later(family: str) -> None:
    loaded = make_model(family, seed=1)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    adapters = _adapters(model)
    model.load_state_dict(loaded.state_dict(), assign=True)
    for adapter, twin in zip(adapters, _adapters(loaded), strict=True):
        hidden = _hidden(adapter)
        for own, other in zip(adapter.select(adapter.logits(hidden)), twin.select(twin.logits(hidden)), strict=True):
            assert torch.equal(own, other)


def test_one_unknown_router_leaves_the_model_without_a_kind() -> None:
    class Unknown(nn.Module):
        pass

    model: Any = make_model("mixtral", seed=1)
    name = list(_experts(model))[1]
    model.get_submodule(name.removesuffix(".experts")).gate = Unknown()
    assert adapt_router(model, name) is None
    assert router_kind_of(model) is None


def test_a_dense_model_has_no_kind() -> None:
    config = LlamaConfig(**COMMON, intermediate_size=96)
    assert router_kind_of(AutoModelForCausalLM.from_config(config)) is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [("cohere2_moe", {"expert_selection_fn": "sigmoid"})],
)
def test_an_unknown_setting_of_a_known_router_has_no_kind(family: str, changes: dict[str, Any]) -> None:
    assert router_kind_of(_other_model(family, **changes)) is None


def test_an_unknown_module_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="nowhere"):
        adapt_router(_model("mixtral"), "model.layers.0.nowhere")
