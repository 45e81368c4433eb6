"""Random models of real shapes: the store that is written, and its GGUF twin."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from expertd_engine.bench.gguf_model import peer_file, write_gguf
from expertd_engine.bench.make_model import make_model
from expertd_engine.bench.shapes import SHAPES, Cut, make_config
from expertd_engine.bench.weights import SCALE, constant, random_matrix, random_rows, stored_bytes
from expertd_engine.errors import StoreError, UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.families import build_servable_model, find_experts
from expertd_engine.kernels.formats import QUANTISED, dequantise
from expertd_engine.kernels.row_order import ROW_FORMATS, matrix_bytes

import torch  # isort: skip
from support.row_values import dequantise_rows

TINY = Cut(layers=2, vocabulary=300, narrow=8)
GPT_OSS = Cut(layers=2, vocabulary=300, narrow=5)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("format", QUANTISED)
def test_random_quantised_weights_are_as_large_as_initial_ones(format: str) -> None:
    packed = random_matrix(format, 40, 256, rng())
    assert len(packed) == stored_bytes(format, 40, 256)
    values = dequantise(packed, format, 48, 256)
    assert values[:40].std() == pytest.approx(SCALE, rel=0.05)
    assert abs(values[:40].mean()) < SCALE / 5
    assert not values[40:].any(), "rows of padding weigh nothing"


@pytest.mark.parametrize("format", ROW_FORMATS)
def test_random_weights_in_rows_are_as_large(format: str) -> None:
    stored = random_rows(format, 48, 160, rng())
    assert len(stored) == matrix_bytes(format, 48, 160)
    values = dequantise_rows(stored, format, 48, 160)
    assert values.std() == pytest.approx(SCALE, rel=0.1)
    assert abs(values.mean()) < SCALE / 5


def test_random_plain_weights_are_as_large_as_initial_ones() -> None:
    single = random_matrix("float32", 40, 256, rng()).view("<f4")
    half = (random_matrix("bfloat16", 40, 256, rng()).view("<u2").astype("<u4") << 16).view("<f4")
    for values in (single, half):
        assert len(values) == 40 * 256
        assert np.isfinite(values).all()
        assert values.std() == pytest.approx(SCALE, rel=0.15)
        assert abs(values.mean()) < SCALE / 20
    assert (constant("bfloat16", 3, 1.0).view("<u2") == 0x3F80).all()
    assert (constant("float32", 3, -2.5).view("<f4") == -2.5).all()


def test_random_columns_must_fill_groups() -> None:
    with pytest.raises(ValueError, match="32, not 40"):
        random_matrix("int4s", 16, 40, rng())


@pytest.mark.parametrize(("shape", "billions", "expert_share"), [
    ("olmoe-1b-7b", 6.92, 0.93), ("qwen3-30b-a3b", 30.53, 0.95), ("mixtral-8x7b", 46.70, 0.966),
    ("gpt-oss-20b", 20.91, 0.91),
])  # fmt: skip
def test_shapes_have_the_published_number_of_parameters(shape: str, billions: float, expert_share: float) -> None:
    model = build_servable_model(make_config(shape), torch.bfloat16)
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    experts = sum(parameter.numel() for _, module in find_experts(model) for parameter in module.parameters())
    assert total / 1e9 == pytest.approx(billions, rel=0.003)
    assert experts / total == pytest.approx(expert_share, abs=0.01)


@pytest.mark.parametrize(("shape", "cut", "message"), [
    ("gpt-5", Cut(), "gpt-5"), ("olmoe-1b-7b", Cut(layers=17), "layers 17"), ("olmoe-1b-7b", Cut(narrow=3), "narrow 3"),
    ("mixtral-8x7b", Cut(vocabulary=0), "vocabulary 0"),
])  # fmt: skip
def test_what_is_no_shape_is_refused(shape: str, cut: Cut, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(shape, cut)


@pytest.mark.parametrize(("shape", "experts", "dense"), [
    ("olmoe-1b-7b", "int4s", "int4s"), ("qwen3-30b-a3b", "int8", "bf16"), ("gpt-oss-20b", "bf16", "bf16"),
    ("mixtral-8x7b", "int4", "int8"),
])  # fmt: skip
def test_the_store_is_sound(shape: str, experts: str, dense: str, tmp_path: Path) -> None:
    cut = GPT_OSS if shape == "gpt-oss-20b" else TINY
    store = make_model(shape, tmp_path / "store", experts, dense, cut=cut)
    store.verify()
    assert (store.index.experts_format, store.index.dense_format) == (experts, dense)
    assert store.index.top_k == json.loads((store.path / "config.json").read_text())["num_experts_per_tok"]
    assert store.index.router_kind is not None
    assert len(store.index.layers) == 2


def test_equal_arguments_write_equal_stores(tmp_path: Path) -> None:
    one, other, third = (
        make_model("olmoe-1b-7b", tmp_path / name, "int4s", cut=TINY, seed=seed).index
        for name, seed in (("one", 1), ("other", 1), ("third", 2))
    )
    assert one.layers == other.layers
    assert one.files == other.files
    assert one.layers != third.layers


@pytest.mark.parametrize("format", ["bf16", "fp8", "int4"])
def test_a_store_for_gpus_whose_layers_share_records(format: str, tmp_path: Path) -> None:
    store = make_model("qwen3-30b-a3b", tmp_path / "store", format, cut=TINY, order="rows", one_layer=True)
    store.verify()
    first, second = store.index.layers
    assert (first.offset, first.crc32) == (second.offset, second.crc32) and first.module != second.module
    assert store.index.files["experts.bin"].bytes == store.index.expert_bytes_total() // 2
    store.require_order("rows")
    with pytest.raises(StoreError, match=r"made for a GPU, not for a CPU.*`expertd prepare --for cpu`"):
        store.require_order("strips")


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_gguf_twin_has_the_same_matrices_in_as_many_bits(shape: str, tmp_path: Path) -> None:
    cut = GPT_OSS if shape == "gpt-oss-20b" else TINY
    store = make_model(shape, tmp_path / "store", "int4s", cut=cut)
    path = peer_file(store)
    write_gguf(store, path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    width = json.loads((store.path / "config.json").read_text())["hidden_size"]
    assert list(tensors["blk.1.ffn_up_exps.weight"].shape[::2]) == [width, store.index.layers[1].num_experts]
    for name in ("blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight", "token_embd.weight", "output.weight"):
        assert tensors[name].tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    ours, theirs = _weights(store), sum(int(tensor.n_elements) for tensor in tensors.values())
    assert theirs == ours


def test_blocks_of_the_gguf_twin_decode_to_weights_of_the_same_size(tmp_path: Path) -> None:
    for format in QUANTISED:
        store = make_model("olmoe-1b-7b", tmp_path / format, format, cut=TINY)
        write_gguf(store, peer_file(store))
        tensor = next(t for t in gguf.GGUFReader(peer_file(store)).tensors if t.name == "blk.0.ffn_up_exps.weight")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert values.std() == pytest.approx(SCALE, rel=0.05)


def _weights(store: ExpertStore) -> int:
    """Numbers in the store, padding left out."""
    index = store.index
    experts = sum(
        layer.num_experts * sum(int(np.prod(spec.shape)) for spec in index.layouts[layer.layout].tensors)
        for layer in index.layers
    )
    with store.dense_path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    shapes = {
        name: index.quantised[name].shape if name in index.quantised else e["shape"] for name, e in header.items()
    }
    return experts + sum(int(np.prod(shape)) for shape in shapes.values())
