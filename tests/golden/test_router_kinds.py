"""Router adapters against the router modules of transformers: bit-equal, or of no known kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from expertd_engine.model.router_kinds import adapt_router, check_adapter, router_kind_of
from expertd_engine.model.router_rules import RouterKind
from support.routers import EVERY, adapters_of, experts_of, generator, hidden_for, model_of, other_model
from support.tiny_checkpoints import make_checkpoint, make_model
from support.tiny_families import COMMON, FAMILIES, OTHERS

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


@pytest.mark.parametrize("family", EVERY)
def test_kind_is_declared(family: str) -> None:
    model = model_of(family)
    assert router_kind_of(model) == KINDS[family]
    assert {adapter.kind for adapter in adapters_of(model)} == {KINDS[family]}
    assert len(adapters_of(model)) == len(experts_of(model))


@pytest.mark.parametrize("family", EVERY)
def test_bit_equal_to_the_module_in_float32(family: str) -> None:
    assert all(check_adapter(adapter, generator(3)) for adapter in adapters_of(model_of(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_bit_equal_to_the_module_in_bfloat16_as_loaded(family: str, tmp_path: Any) -> None:
    make_checkpoint(family, tmp_path, seed=1, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(check_adapter(adapter, generator(3)) for adapter in adapters_of(model))


@pytest.mark.parametrize("family", OTHERS)
def test_bit_equal_to_the_module_in_bfloat16(family: str) -> None:
    adapters = adapters_of(other_model(family).to(torch.bfloat16))
    assert all(check_adapter(adapter, generator(3)) for adapter in adapters)


@pytest.mark.parametrize("family", EVERY)
def test_experts_receive_what_the_adapter_selects(family: str) -> None:
    """In a whole forward pass, from the hidden states that the experts themselves are given."""
    model = model_of(family)
    received: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def record(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, arguments: received.update({name: arguments})

    hooks = [module.register_forward_pre_hook(record(name)) for name, module in experts_of(model).items()]
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
    assert received.keys() == experts_of(model).keys()


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
    adapter = adapters_of(make_model(family, seed=1))[0]
    assert check_adapter(adapter, generator(3))
    setattr(adapter.module, attribute, value)
    assert not check_adapter(adapter, generator(3))


def test_check_refuses_a_module_in_training_mode() -> None:
    adapter = adapters_of(make_model("phimoe", seed=1).train())[0]
    with pytest.raises(ValueError, match=r"training mode; call eval\(\)"):
        check_adapter(adapter, generator(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_made_on_meta_sees_weights_loaded_later(family: str) -> None:
    loaded = make_model(family, seed=1)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    adapters = adapters_of(model)
    model.load_state_dict(loaded.state_dict(), assign=True)
    for adapter, twin in zip(adapters, adapters_of(loaded), strict=True):
        hidden = hidden_for(adapter)
        for own, other in zip(adapter.select(adapter.logits(hidden)), twin.select(twin.logits(hidden)), strict=True):
            assert torch.equal(own, other)


def test_one_unknown_router_leaves_the_model_without_a_kind() -> None:
    class Unknown(nn.Module):
        pass

    model: Any = make_model("mixtral", seed=1)
    name = list(experts_of(model))[1]
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
    assert router_kind_of(other_model(family, **changes)) is None


def test_an_unknown_module_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="nowhere"):
        adapt_router(model_of("mixtral"), "model.layers.0.nowhere")
