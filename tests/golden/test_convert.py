"""The block model computes what the dense model computes; what Mixtral cannot express is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from expertd_engine import convert
from expertd_engine.convert import allowed_blocks, choose_blocks, convert_blocks, main
from expertd_engine.dense_source import open_weights
from expertd_engine.errors import ModelError, UsageError
from expertd_engine.refactor.dense import open_dense
from support.tiny_mixtral import FFN, make_llama

PROMPT = torch.arange(40, 90)[None]


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(PROMPT).logits
    return logits


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_block_model_equals_the_dense_one(blocks: int, tied: bool, tmp_path: Path) -> None:
    dense = make_llama(tmp_path / "dense", tie_word_embeddings=tied)
    convert_blocks(tmp_path / "dense", tmp_path / "blocks", blocks)
    model = _load(tmp_path / "blocks")
    assert (model.config.model_type, model.config.architectures) == ("mixtral", ["MixtralForCausalLM"])
    assert model.config.num_experts_per_tok == model.config.num_local_experts == blocks
    torch.testing.assert_close(_logits(model), _logits(dense), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_exact_slices_and_down_proj_is_scaled_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    state = make_llama(tmp_path / "dense", dtype=dtype).state_dict()
    convert_blocks(tmp_path / "dense", tmp_path / "blocks", 4)
    stored = load_file(tmp_path / "blocks" / "model.safetensors")
    size = FFN // 4
    for layer in range(3):
        dense, moe = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        for block in range(4):
            rows = slice(block * size, (block + 1) * size)
            expert = f"{moe}.experts.{block}"
            assert torch.equal(stored[f"{expert}.w1.weight"], state[f"{dense}.gate_proj.weight"][rows])
            assert torch.equal(stored[f"{expert}.w3.weight"], state[f"{dense}.up_proj.weight"][rows])
            columns = state[f"{dense}.down_proj.weight"][:, rows]
            assert torch.equal(stored[f"{expert}.w2.weight"].double(), columns.double() * 4)
        assert not stored[f"{moe}.gate.weight"].any()
    assert all(tensor.dtype == dtype for tensor in stored.values())
    assert torch.equal(stored["lm_head.weight"], state["lm_head.weight"])


def test_asked_dtype_is_written(tmp_path: Path) -> None:
    state = make_llama(tmp_path / "dense").state_dict()
    convert_blocks(tmp_path / "dense", tmp_path / "blocks", 2, "bf16")
    stored = load_file(tmp_path / "blocks" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(stored[name], state[name].bfloat16())
    assert AutoConfig.from_pretrained(tmp_path / "blocks").dtype == torch.bfloat16
    with pytest.raises(UsageError, match="'int8' is not known: allowed are auto, float32, bf16"):
        convert_blocks(tmp_path / "dense", tmp_path / "other", 2, "int8")


def test_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_llama(tmp_path / "dense")
    monkeypatch.setattr(convert, "_SHARD_BYTES", 60_000)
    convert_blocks(tmp_path / "dense", tmp_path / "blocks", 4)
    shards = sorted(path.name for path in (tmp_path / "blocks").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "blocks" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    torch.testing.assert_close(_logits(_load(tmp_path / "blocks")), _logits(dense), rtol=0, atol=1e-4)


def test_tokenizer_template_and_generation_settings_are_kept(tmp_path: Path) -> None:
    make_llama(tmp_path / "dense")
    convert_blocks(tmp_path / "dense", tmp_path / "blocks", 2)
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("dense", "blocks"))
    assert before("Some text.").input_ids == after("Some text.").input_ids
    assert after.chat_template == before.chat_template is not None
    assert (tmp_path / "blocks" / "tokenizer.json").is_file()
    settings = [(tmp_path / name / "generation_config.json").read_text() for name in ("dense", "blocks")]
    assert settings[0] == settings[1]


def test_mistral_keeps_its_window(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    make_llama(tmp_path / "dense")  # for its tokenizer
    dense.save_pretrained(tmp_path / "dense")
    convert_blocks(tmp_path / "dense", tmp_path / "blocks", 2)
    model = _load(tmp_path / "blocks")
    assert model.config.sliding_window == 8
    torch.testing.assert_close(_logits(model), _logits(dense), rtol=0, atol=1e-4)


@pytest.mark.parametrize("blocks", [3, 8, 0, -2])
def test_block_counts_that_do_not_work_are_listed_with_those_that_do(blocks: int, tmp_path: Path) -> None:
    make_llama(tmp_path / "dense")
    message = rf"--blocks {blocks} does not work for an FFN of {FFN} neurons: allowed are 1, 2, 4 "
    with pytest.raises(ModelError, match=message):
        convert_blocks(tmp_path / "dense", tmp_path / "blocks", blocks)
    assert not (tmp_path / "blocks").exists()


@pytest.mark.parametrize(("ffn", "allowed", "default"), [(1536, [1, 2, 4, 8, 16], 16), (11008, [1, 2, 4, 8], 8)])
def test_default_block_count(ffn: int, allowed: list[int], default: int) -> None:
    config = AutoConfig.for_model("llama", intermediate_size=ffn)
    assert allowed_blocks(config) == allowed
    assert choose_blocks(config, None) == default
    with pytest.raises(ModelError, match="allowed are none"):
        choose_blocks(AutoConfig.for_model("llama", intermediate_size=40), None)


_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen3Config(), "qwen3 cannot become a block model: its type is none of llama, mistral"),
        (Qwen2Config(), "qwen2 cannot become a block model"),
        (AutoConfig.for_model("llama", attention_bias=True), "it has attention_bias; allowed are Llama and Mistral"),
        (AutoConfig.for_model("llama", mlp_bias=True), "it has mlp_bias"),
        (AutoConfig.for_model("llama", rope_parameters=_ROPE), "rope type 'dynamic'"),
    ],
)
def test_what_mixtral_cannot_express_is_refused(config: Any, reason: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match=reason):
        convert_blocks(tmp_path / "dense", tmp_path / "blocks", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_unreadable_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    for name in ("broken.gguf", "absent.gguf"):
        with pytest.raises(ModelError, match=name):
            convert_blocks(tmp_path / name, tmp_path / "blocks", 2)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: open_weights(path, AutoConfig.for_model("llama"), torch.float32),
        lambda path: open_dense(path, torch.device("cpu")),
    ],
    ids=["blocks", "texts"],
)
def test_frequency_factors_of_a_gguf_file_are_not_passed_over(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "llama3.gguf").write_bytes(b"GGUF" + b"\0" * 60 + b"rope_freqs.weight" + b"\0" * 60)
    with pytest.raises(ModelError, match=r"llama3\.gguf: its rope_freqs cannot be read"):
        read(tmp_path / "llama3.gguf")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_llama(tmp_path / "dense")
    dense, blocks = str(tmp_path / "dense"), str(tmp_path / "blocks")
    assert main(["--blocks", "4", dense, blocks]) == 0
    assert AutoConfig.from_pretrained(blocks).num_local_experts == 4
    assert main(["--blocks", "4", dense, blocks]) == 3
    assert "exists already" in capsys.readouterr().err
