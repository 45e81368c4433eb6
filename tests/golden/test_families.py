"""What cannot be served exactly is refused by name and reason before a byte is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from expertd_engine.errors import ModelError
from expertd_engine.families import build_servable_model, find_experts, refuse_unservable
from expertd_engine.prepare import prepare
from support.tiny_families import FAMILIES, TINY_FAMILIES


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("minimax", {}, "recurrent state"),
        ("qwen3_next", {}, "recurrent state"),
        ("jamba", {}, "recurrent state"),
        ("granitemoehybrid", {}, "recurrent state"),
        ("lfm2_moe", {}, "recurrent state"),
        ("dbrx", {}, "experts interface"),
        ("jetmoe", {}, "experts interface"),
        ("llama4", {}, "experts interface"),
        ("llama4_text", {}, "experts interface"),
        ("longcat_flash", {}, "experts interface"),
        ("nllb-moe", {}, "encoder-decoder"),
        ("switch_transformers", {}, "encoder-decoder"),
        ("qwen3_vl_moe", {}, "images"),
        ("clip_text_model", {}, "no causal language model"),
        ("mixtral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ("cohere2_moe", {"layer_types": ["chunked_attention"], "num_hidden_layers": 1}, "chunked_attention"),
    ],
)
def test_refused_by_name_and_reason(model_type: str, settings: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(model_type, **settings)
    with pytest.raises(ModelError, match=reason) as caught:
        refuse_unservable(config)
    assert config.model_type in str(caught.value)


@pytest.mark.parametrize("model_type", ["minimax", "dbrx", "granitemoehybrid"])
def test_prepare_refuses_before_it_reads_or_writes_anything(model_type: str, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"  # it holds no weights
    AutoConfig.for_model(model_type, num_hidden_layers=2).save_pretrained(source)
    with pytest.raises(ModelError, match=f"'{model_type}' cannot be served"):
        prepare(source, tmp_path / "store")
    assert list(tmp_path.iterdir()) == [source]


def test_longrope_is_refused() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "short_mscale": 1.0, "long_mscale": 1.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = AutoConfig.for_model("phimoe", rope_parameters=rope, hidden_size=32, num_attention_heads=4)
    with pytest.raises(ModelError, match="phimoe with rope type 'longrope' cannot be served: allowed are default"):
        refuse_unservable(config)


def test_dense_models_are_told_what_to_do() -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .* dense model without experts; `expertd convert`"):
        build_servable_model(AutoConfig.for_model("llama", **small), torch.float32)
    with pytest.raises(ModelError, match=r"Qwen3ForCausalLM .* dense model without experts$"):
        build_servable_model(AutoConfig.for_model("qwen3", **small), torch.float32)


def test_a_moe_family_that_nobody_checked_is_refused() -> None:
    config = AutoConfig.for_model("granitemoeshared", num_hidden_layers=2)
    with pytest.raises(
        ModelError, match=r"'granitemoeshared' cannot be served: .*has not been checked; checked are .*mixtral"
    ):
        build_servable_model(config, torch.bfloat16)


@pytest.mark.parametrize("model_type", sorted(TINY_FAMILIES))
def test_servable_types_pass_with_their_default_configuration(model_type: str) -> None:
    refuse_unservable(AutoConfig.for_model(model_type))


def test_a_servable_model_holds_no_weights_and_real_buffers() -> None:
    model = build_servable_model(FAMILIES["mixtral"](), torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert [name for name, _ in find_experts(model)] == [f"model.layers.{i}.mlp.experts" for i in range(3)]
