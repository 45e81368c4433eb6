"""Writes a GGUF file of random weights in the shape of an expert store, so that a peer can be timed on the same model.

Every matrix has as many bits as in the store: int4s is Q4_0, int4 is Q4_1, int8 is Q8_0. The values are other random
ones. Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from expertd_engine.bench.weights import SCALE, constant, random_bytes, random_matrix
from expertd_engine.errors import UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.kernels.formats import Bytes

_PIECE_BYTES = 32 * 2**20
_ARCHITECTURES = {
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
}
_KINDS = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
    "int4": gguf.GGMLQuantizationType.Q4_1,
    "int4s": gguf.GGMLQuantizationType.Q4_0,
}
_HALVES = {
    gguf.GGMLQuantizationType.Q8_0: (SCALE / 73.3,),
    gguf.GGMLQuantizationType.Q4_1: (SCALE / 4.61, -7.5 * SCALE / 4.61),
    gguf.GGMLQuantizationType.Q4_0: (SCALE / 4.61,),
}
"""Float16 numbers with which a block begins: its scale, and in Q4_1 its minimum."""
_EXPERTS = {
    "gate_proj": gguf.MODEL_TENSOR.FFN_GATE_EXP,
    "up_proj": gguf.MODEL_TENSOR.FFN_UP_EXP,
    "down_proj": gguf.MODEL_TENSOR.FFN_DOWN_EXP,
}


class _Tensor(NamedTuple):
    """`shape` is row-major. `fill` is the value of a vector; None: random."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    fill: float | None


def peer_file(store: ExpertStore) -> Path:
    """Where the store's GGUF twin is kept: beside it, named after its identity."""
    path = store.path.resolve()
    return path.with_name(f"{path.name}-{store.index.store_id[:12]}.gguf")


def write_gguf(store: ExpertStore, path: Path, seed: int = 0) -> None:
    """Write the store's twin. Raises UsageError for a model type whose GGUF form we do not know."""
    if store.index.model_type not in _ARCHITECTURES:
        raise UsageError(
            f"a {store.index.model_type} model cannot be written for llama.cpp: known are {', '.join(_ARCHITECTURES)}"
        )
    config = json.loads((store.path / "config.json").read_text(encoding="utf-8"))
    architecture = _ARCHITECTURES[store.index.model_type]
    tensors = [*_dense_tensors(store, architecture), *_expert_tensors(store.index)]
    partial = path.with_name(f".{path.name}.partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, config)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), _bytes(tensor), raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.Generator(np.random.SFC64(seed))
    for tensor in tensors:
        writer.write_tensor_data(_Pieces(tensor, rng))
    writer.close()
    partial.rename(path)


class _Pieces:
    """A tensor as the writer wants it, drawn while it is written: what the writer calls of an array, and no more."""

    def __init__(self, tensor: _Tensor, rng: np.random.Generator) -> None:
        self.nbytes = _bytes(tensor)
        self._tensor = tensor
        self._rng = rng

    def tofile(self, file: Any) -> None:
        for piece in _pieces(self._tensor, self._rng):
            file.write(piece.data)


def _describe(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """What llama.cpp must know of the model; there is no vocabulary, only its size."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config.get("moe_intermediate_size") or config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _dense_tensors(store: ExpertStore, architecture: gguf.MODEL_ARCH) -> Iterator[_Tensor]:
    """The store's dense weights under llama.cpp's names; routers and vectors in float32, as its converter has them."""
    index = store.index
    names = gguf.get_tensor_name_map(architecture, len(index.layers))
    for name, shape in _dense_shapes(store).items():
        quantised = index.quantised.get(name)
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise UsageError(f"llama.cpp has no place for the weight {name} of a {index.model_type} model")
        if quantised is not None:
            yield _Tensor(known, _KINDS[quantised.format], tuple(quantised.shape), None)
        elif len(shape) == 2:
            is_router = name.split(".")[-2] in ("gate", "router")
            kind = gguf.GGMLQuantizationType.F32 if is_router else _KINDS[_plain(index.dense_dtype)]
            yield _Tensor(known, kind, shape, None)
        else:
            named = known if known.endswith((".weight", ".bias")) else f"{known}.weight"  # sinks
            yield _Tensor(named, gguf.GGMLQuantizationType.F32, shape, 1.0 if "norm" in name else 0.0)


def _expert_tensors(index: StoreIndex) -> Iterator[_Tensor]:
    for number, layer in enumerate(index.layers):
        for spec in index.layouts[layer.layout].tensors:
            own = spec.name.removesuffix("_bias")
            base = gguf.TENSOR_NAMES[_EXPERTS[own]].format(bid=number)
            shape = (layer.num_experts, *spec.shape)
            if own != spec.name:
                yield _Tensor(f"{base}.bias", gguf.GGMLQuantizationType.F32, shape, 0.0)
            else:
                yield _Tensor(f"{base}.weight", _KINDS[spec.dtype], shape, None)


def _dense_shapes(store: ExpertStore) -> dict[str, tuple[int, ...]]:
    """Names and shapes in dense.safetensors, from its header."""
    with store.dense_path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def _bytes(tensor: _Tensor) -> int:
    block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    return int(math.prod(tensor.shape) // block * size)


def _pieces(tensor: _Tensor, rng: np.random.Generator) -> Iterator[Bytes]:
    if tensor.fill is not None:
        yield constant("float32", math.prod(tensor.shape), tensor.fill)
        return
    total, done = _bytes(tensor), 0
    _, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    while done < total:
        count = min(_PIECE_BYTES // size * size, total - done)
        yield _random(tensor.kind, count, rng)
        done += count


def _random(kind: gguf.GGMLQuantizationType, count: int, rng: np.random.Generator) -> Bytes:
    """`count` bytes of whole blocks."""
    if kind not in _HALVES:
        dtype = "float32" if kind == gguf.GGMLQuantizationType.F32 else "bfloat16"
        return random_matrix(dtype, 1, count // (4 if dtype == "float32" else 2), rng)
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random_bytes(count, rng).reshape(-1, size)
    halves = np.array(_HALVES[kind], "<f2").view(np.uint8)
    blocks[:, : len(halves)] = halves
    return blocks.reshape(-1)


def _plain(dense_dtype: str) -> str:
    return "bfloat16" if dense_dtype == "bf16" else dense_dtype
