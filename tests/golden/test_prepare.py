"""A store holds exactly the model's weights, in whatever format it keeps them."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from expertd_engine.errors import ModelError, StoreError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import tensor_bytes
from expertd_engine.families import build_servable_model, dense_dtype_plan, find_experts, tied_names
from expertd_engine.kernels.formats import QUANTISED, dequantise
from expertd_engine.kernels.row_order import ROW_FORMATS
from expertd_engine.model.router_kinds import adapt_router
from expertd_engine.prepare import main, prepare
from expertd_engine.weights_plan import plan_quantised
from support.engine import running_engine
from support.row_values import dequantise_rows
from support.tiny_checkpoints import make_checkpoint, make_model
from support.tiny_families import FAMILIES, TINY_FAMILIES, make_config
from support.tiny_mixtral import EXPERT_11, EXPERTS, make_mixtral, rewritten

Record = dict[str, torch.Tensor]


def _records(store: ExpertStore) -> Iterator[tuple[str, int, Record]]:
    """`(experts module, expert, its tensors)` of every record, through the reader and the index alone."""
    with store.open_records() as records:
        for address in store.experts():
            layer = store.index.layers[address.layer]
            buffer = memoryview(mmap.mmap(-1, store.index.record_bytes(address.layer)))
            records.read_record(address, buffer)
            tensors = {}
            order = store.index.layouts[layer.layout].order
            for spec in store.index.layouts[layer.layout].tensors:
                assert spec.offset % 64 == 0
                stored = buffer[spec.offset : spec.offset + tensor_bytes(spec.dtype, spec.shape, order)]
                values = _values if order == "strips" else _row_values
                tensors[spec.name] = values(torch.frombuffer(stored, dtype=torch.uint8), spec.dtype, spec.shape)
            yield layer.module, address.expert, tensors


def _row_values(stored: torch.Tensor, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Likewise, of a store for GPUs."""
    if dtype in ROW_FORMATS:
        return torch.from_numpy(dequantise_rows(stored.numpy(), dtype, *shape))
    return _values(stored, dtype, shape)


def _values(stored: torch.Tensor, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """What the bytes of a stored tensor stand for."""
    if dtype in QUANTISED:
        rows, cols = shape
        return torch.from_numpy(dequantise(stored.numpy(), dtype, rows, cols))
    plain: torch.dtype = getattr(torch, dtype)
    return stored.view(plain).view(torch.Size(shape))


def _expected(module: torch.nn.Module, expert: int) -> Record:
    """One expert's tensors as a record should have them, of a module as its family has it."""
    record: Record = {}
    for name, parameter in module.named_parameters():
        tensor = parameter[expert].T if module.is_transposed and parameter[expert].dim() == 2 else parameter[expert]
        if not name.startswith("gate_up_proj"):
            record[name] = tensor
            continue
        half = len(tensor) // 2
        gate, up = (
            (slice(half), slice(half, None)) if module.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        )
        record |= {name.replace("gate_up", "gate"): tensor[gate], name.replace("gate_up", "up"): tensor[up]}
    return record


def _assert_holds(store: ExpertStore, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Every weight of `model`, cast to `dtype` as transformers would, is in the store; and nothing else."""
    seen = 0
    for module, expert, tensors in _records(store):
        expected = _expected(model.get_submodule(module), expert)
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            kept = torch.float32 if name.endswith("_bias") else dtype
            assert torch.equal(tensors[name], tensor.to(kept)), (module, expert, name)
        seen += 1
    assert seen == sum(next(module.parameters()).shape[0] for _, module in find_experts(model))
    dense, plan, state = load_file(store.dense_path), dense_dtype_plan(model.to(dtype), dtype), model.state_dict()
    assert dense.keys() == plan.keys()
    for name, tensor in dense.items():
        assert torch.equal(tensor, state[name].to(plan[name])) and tensor.dtype == plan[name], name


def test_records_equal_the_models_slices(tmp_path: Path) -> None:
    model = make_mixtral(tmp_path / "checkpoint")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 2
    store = prepare(tmp_path / "checkpoint", tmp_path / "store", "float32")
    index = store.index
    assert (index.name, index.model_type, index.architecture) == ("checkpoint", "mixtral", "MixtralForCausalLM")
    assert (index.top_k, index.router_kind, index.experts_format) == (2, "softmax-topk", "float32")
    assert [layer.num_experts for layer in index.layers] == [EXPERTS] * 3
    store.verify()
    _assert_holds(store, model, torch.float32)


def test_bf16_rounds_as_transformers_does(tmp_path: Path) -> None:
    model = make_mixtral(tmp_path / "checkpoint")
    store = prepare(tmp_path / "checkpoint", tmp_path / "store", "bf16", name="tiny")
    assert store.index.name == "tiny"
    _assert_holds(store, model, torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_stored_whole(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "checkpoint", seed=1)
    store = prepare(tmp_path / "checkpoint", tmp_path / "store", "float32")
    assert store.index.router_kind is not None
    _assert_holds(store, make_model(family, seed=1), torch.float32)


def _error(stored: torch.Tensor, weights: torch.Tensor) -> float:
    """Root mean square of the error over that of the weights."""
    assert stored.shape == weights.shape
    return float((stored - weights.detach()).norm() / weights.detach().norm())


ROUNDING = {"int8": 0.008, "int4": 0.1, "int4s": 0.11}
ROUNDING_FP8 = 0.04
"""Bounds of `_error`. Normal distributions have 0.0048, 0.071 and 0.082; narrow random matrices somewhat more."""


@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_every_family_is_stored_quantised(family: str, format: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "checkpoint", seed=1)
    store, model = prepare(tmp_path / "checkpoint", tmp_path / "store", format), make_model(family, seed=1)
    index = store.index
    assert (index.experts_format, index.dense_format, index.dense_dtype) == (format, format, "float32")
    for module, expert, tensors in _records(store):
        expected = _expected(model.get_submodule(module), expert)
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert _error(tensors[name], tensor) <= (0 if name.endswith("_bias") else ROUNDING[format])
    dense, state = load_file(store.dense_path), model.state_dict()
    assert dense.keys() == dense_dtype_plan(model, torch.float32).keys()
    for name, tensor in dense.items():
        if name in index.quantised:
            form = index.quantised[name]
            is_end = name in ("model.embed_tokens.weight", "lm_head.weight")
            assert form.format == ("int8" if is_end and format == "int4" else format)
            assert _error(_values(tensor, form.format, form.shape), state[name]) <= ROUNDING[form.format]
        else:
            assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("format", ["bf16", *ROW_FORMATS])
def test_a_store_for_gpus_holds_the_same_numbers(format: str, tmp_path: Path) -> None:
    make_checkpoint("gpt_oss", tmp_path / "checkpoint", seed=1)
    store = prepare(tmp_path / "checkpoint", tmp_path / "gpu", format, "float32", order="rows")
    beside = prepare(tmp_path / "checkpoint", tmp_path / "cpu", "float32" if format == "fp8" else format, "float32")
    store.verify()
    assert {layout.order for layout in store.index.layouts} == {"rows"}
    for (_, _, ours), (_, _, theirs) in zip(_records(store), _records(beside), strict=True):
        for name, tensor in theirs.items():
            if format == "fp8" and not name.endswith("_bias"):
                assert _error(ours[name], tensor) <= ROUNDING_FP8
            else:
                assert torch.equal(ours[name], tensor)


def test_fp8_goes_with_gpus_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_checkpoint("mixtral", tmp_path / "checkpoint", seed=1)
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "store"), "--experts", "fp8"]
    assert main(arguments) == 2
    assert "'fp8' is read by GPUs alone: add `--for gpu`" in capfd.readouterr().err
    assert main([*arguments, "--for", "gpu"]) == 0
    index = ExpertStore.open(tmp_path / "store").index
    assert (index.experts_format, index.dense_format) == ("fp8", "bf16")
    with (
        pytest.raises(StoreError, match=r"made for a GPU, not for a CPU: .*`expertd prepare --for cpu`"),
        running_engine(tmp_path / "store", device="cpu"),
    ):
        pass


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_what_is_delicate_or_small_is_never_quantised(family: str) -> None:
    config = make_config(family)
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    for name in set(counts) & set(vars(config)):
        setattr(config, name, 96)  # so many that it is not for its size that a router is left out
    model = build_servable_model(config, torch.float32)
    quantised = plan_quantised(model, "int8")
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"} <= quantised.keys()
    routers = [adapter.module for name, _ in find_experts(model) if (adapter := adapt_router(model, name))]
    assert len(routers) == len(find_experts(model))
    delicate = {id(parameter) for router in routers for parameter in router.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in delicate or parameter.dim() != 2 or min(parameter.shape) < 32:
            assert name not in quantised


def test_formats_of_experts_and_dense_weights_are_chosen_apart(tmp_path: Path) -> None:
    model = make_mixtral(tmp_path / "checkpoint")
    store = prepare(tmp_path / "checkpoint", tmp_path / "one", "int4", "bf16")
    assert (store.index.dense_dtype, store.index.quantised, store.index.layouts[0].format) == ("bf16", {}, "int4")
    norm = "model.norm.weight"
    assert torch.equal(load_file(store.dense_path)[norm], model.state_dict()[norm].bfloat16())
    store = prepare(tmp_path / "checkpoint", tmp_path / "other", "bf16", "int8")
    assert store.index.dense_dtype == "float32" and {spec.dtype for spec in store.index.layouts[0].tensors} == {
        "bfloat16"
    }
    assert len(store.index.quantised) == 3 * 2 + 2  # queries and outputs of three layers (keys are narrow), both ends


def test_quantised_tensors_lie_where_kernels_may_read_them(tmp_path: Path) -> None:
    make_checkpoint("qwen2_moe", tmp_path / "checkpoint", seed=1)
    path = prepare(tmp_path / "checkpoint", tmp_path / "store", "int4").dense_path
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    for spec in json.loads(data[8:begin]).values():
        if spec.get("dtype") == "U8":
            assert (begin + spec["data_offsets"][0]) % 64 == 0


def test_weights_that_a_format_cannot_hold_are_named(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "checkpoint")
    with rewritten(tmp_path / "checkpoint") as tensors:
        tensors[EXPERT_11][3, 3] = torch.inf
    with pytest.raises(ModelError, match=r"layers.2.mlp.experts.up_proj cannot be stored as int4: .* not finite"):
        prepare(tmp_path / "checkpoint", tmp_path / "store", "int4")


def test_what_must_stay_float32_does(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v3", tmp_path / "checkpoint", seed=1)
    dense = load_file(prepare(tmp_path / "checkpoint", tmp_path / "store", "bf16").dense_path)
    kept = {name for name, tensor in dense.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in dense if name.endswith("e_score_correction_bias")} != set()


def test_block_scaled_fp8_is_dequantised(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    make_checkpoint("qwen3_moe", source, seed=1)
    expected: dict[str, torch.Tensor] = {}
    with rewritten(source) as tensors:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            scale = torch.tensor([[0.5 + len(expected) % 7]])
            quantised = (tensors[name] / scale).to(torch.float8_e4m3fn)
            expected[name] = quantised.float() * scale
            tensors |= {name: quantised, f"{name}_scale_inv": scale}
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    store = prepare(source, tmp_path / "store", "float32")
    for module, expert, record in _records(store):
        stored = {name: expected[f"{module}.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")}
        assert all(torch.equal(record[f"{name}_proj"], weight) for name, weight in stored.items())
    attention = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(load_file(store.dense_path)[attention], expected[attention])
    assert "quantization_config" not in json.loads((store.path / "config.json").read_text())


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = make_mixtral(tmp_path / "checkpoint", tie_word_embeddings=True)
    assert tied_names(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    _assert_holds(prepare(tmp_path / "checkpoint", tmp_path / "store", "float32"), model, torch.float32)
    with rewritten(tmp_path / "checkpoint") as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    _assert_holds(prepare(tmp_path / "checkpoint", tmp_path / "again", "float32"), model, torch.float32)
    with rewritten(tmp_path / "checkpoint") as tensors:
        tensors["lm_head.weight"][3, 3] += 1
    with pytest.raises(ModelError, match=r"lm_head.weight and model.embed_tokens.weight are tied but differ"):
        prepare(tmp_path / "checkpoint", tmp_path / "differing", "float32")


def test_tokenizer_and_settings_come_along(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "checkpoint")
    prepare(tmp_path / "checkpoint", tmp_path / "store")
    ids = AutoTokenizer.from_pretrained(tmp_path / "store")("a few words").input_ids
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "checkpoint")("a few words").input_ids
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "checkpoint" / name).read_bytes()


def test_the_same_checkpoint_gives_the_same_store_id(tmp_path: Path) -> None:
    make_mixtral(tmp_path / "checkpoint")
    ids = {prepare(tmp_path / "checkpoint", tmp_path / name).index.store_id for name in ("one", "two")}
    assert len(ids) == 1
