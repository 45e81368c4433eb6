"""Builds the model from a store: transformers' own modules, dense weights in memory we own, experts nowhere.

Dense weights lie in private anonymous memory, not in a mapped file: mapped pages would count as page cache, which a
memory cgroup reclaims in the middle of a step.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expertd_engine.errors import StoreError
from expertd_engine.experts.slab import PAGE, Slab
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import DENSE_NAME
from expertd_engine.families import DTYPES, Model, build_meta_model, find_experts, load_config, tied_names
from expertd_engine.kernels.library import Pool
from expertd_engine.model.attention import ATTENTION_NAME, paged_attention
from expertd_engine.model.dense import Matrix, NativeMatrices, TorchMatrices, install
from expertd_engine.model.expert_native import NativeExperts, Unsupported, expert_layout
from expertd_engine.model.expert_torch import SlotViews, TorchExperts
from expertd_engine.model.moe import EXPERTS_NAME, ExpertKernel, MoELayer, experts_function
from expertd_engine.model.numerics import make_invariant
from expertd_engine.model.router_rules import RouterKind

_CHUNK_BYTES = 8 * 2**20
_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """`moe_modules[i]` is the experts module of MoE layer i; it gets its `MoELayer` from `attach_experts`."""

    model: Model
    moe_modules: Sequence[torch.nn.Module]
    dtype: torch.dtype
    dense_bytes: int
    vocab_size: int
    context_tokens: int
    """What the model was made for: `max_position_embeddings`."""
    eos_token_ids: tuple[int, ...]
    float32_sigmoids: bool
    """Whether it may compute sigmoids in float32, as routers of that kind do whatever the weights."""
    fallbacks: list[str]
    """What is slower than designed, for people to read."""
    pool: Pool | None
    """The native kernels' threads; None where there are none."""
    pregating: torch.nn.Module | None = None
    """The router that chooses all layers' experts from tokens alone; None where each layer has its own."""


def load_model(store: ExpertStore, pool: Pool | None = None) -> LoadedModel:
    """Build the store's model with everything but its experts. Raises StoreError or ModelError.

    `pool` runs the native kernels; without, everything is computed in torch.
    """
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, experts_function)
    config = load_config(store.path)
    dtype = DTYPES[store.index.dense_dtype]
    model = build_meta_model(config, dtype, attn_implementation=ATTENTION_NAME, experts_implementation=EXPERTS_NAME)
    modules = dict(find_experts(model))
    if list(modules) != [layer.module for layer in store.index.layers]:
        raise StoreError(f"store {store.path}: its MoE layers are not those of its config.json; prepare it again")
    for module in modules.values():
        module._parameters.clear()  # their bytes live in the store and the slots
    dense, dense_bytes = read_dense(store)
    fallbacks = _load_dense(model, dense, store, pool)
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise StoreError(f"store {store.path} lacks {len(missing)} dense weights, the first is {missing[0]}")
    make_invariant(model, dtype)
    model.requires_grad_(False)
    return LoadedModel(
        model=model,
        moe_modules=list(modules.values()),
        dtype=dtype,
        dense_bytes=dense_bytes,
        vocab_size=model.get_output_embeddings().out_features,
        context_tokens=int(config.max_position_embeddings),
        eos_token_ids=_eos_token_ids(config, _read_json(store, "generation_config.json")),
        float32_sigmoids=dtype == torch.float32 or store.index.router_kind in (RouterKind.SIGMOID_GROUPED, None),
        fallbacks=fallbacks,
        pool=pool,
        pregating=model.router if is_pregated(config) else None,
    )


def is_pregated(config: Any) -> bool:
    """Whether the model has one router for all layers."""
    return bool(config.model_type == "pregated_llama")


def _load_dense(model: Model, dense: Mapping[str, torch.Tensor], store: ExpertStore, pool: Pool | None) -> list[str]:
    """Give the model its dense weights, quantised ones in modules of ours. Returns what is slower than designed."""
    index = store.index
    plain = {name: tensor for name, tensor in dense.items() if name not in index.quantised}
    matrices = {name: Matrix(dense[name], form.format, *form.shape) for name, form in index.quantised.items()}
    tied = tied_names(model)
    kernels = TorchMatrices() if pool is None else NativeMatrices(pool)
    install(model, matrices, tied, DTYPES[index.dense_dtype], kernels)
    model.load_state_dict(plain, strict=False, assign=True)
    if not tied.values() & matrices.keys():
        model.tie_weights()
    if matrices and pool is None:
        return [f"dense {index.dense_format} weights are dequantised by PyTorch for each product"]
    return []


def attach_experts(loaded: LoadedModel, store: ExpertStore, views: SlotViews) -> list[MoELayer]:
    """Give every experts module its layer over `views`; replaces what an earlier call attached."""
    layers = []
    for i, (module, entry) in enumerate(zip(loaded.moe_modules, store.index.layers, strict=True)):
        layers.append(layer := MoELayer(i, _expert_kernel(loaded, module, views, entry.layout)))
        module.expertd_layer = layer  # type: ignore[assignment]  # a plain attribute, not a submodule
    return layers


def _expert_kernel(loaded: LoadedModel, module: torch.nn.Module, views: SlotViews, layout: int) -> ExpertKernel:
    if loaded.pool is not None:
        try:
            return NativeExperts(loaded.pool, expert_layout(module, views.layouts[layout]), views)
        except Unsupported as reason:
            fallback = f"experts are computed by PyTorch, slowly: {reason}"
            if fallback not in loaded.fallbacks:
                loaded.fallbacks.append(fallback)
    return TorchExperts(module, views, layout)


def read_dense(store: ExpertStore) -> tuple[dict[str, torch.Tensor], int]:
    """All dense weights by name and their bytes, checked against the index. Raises StoreError."""
    path = store.dense_path
    entry = store.index.files[DENSE_NAME]
    memory = Slab(1, -(-entry.bytes // PAGE) * PAGE, whole_bytes=entry.bytes).view(0, entry.bytes)
    try:
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < entry.bytes:
                count = file.readinto(memory[done : done + _CHUNK_BYTES])
                if not count:
                    raise StoreError(f"cannot read {path}: it ends at byte {done} of {entry.bytes}")
                done += count
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read once: leave no page cache behind
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    if zlib.crc32(memory) != entry.crc32:
        raise StoreError(f"store {store.path}: file {path.name} is corrupted: its checksum differs from the index")
    header_bytes = int.from_bytes(memory[:8], "little")
    header: dict[str, Any] = json.loads(bytes(memory[8 : 8 + header_bytes]))
    header.pop("__metadata__", None)
    body = memory[8 + header_bytes :]
    return {name: _tensor(body, spec) for name, spec in header.items()}, entry.bytes


def _tensor(body: memoryview, spec: Mapping[str, Any]) -> torch.Tensor:
    dtype = _SAFETENSORS_DTYPES[spec["dtype"]]
    begin, end = spec["data_offsets"]
    if begin == end:
        return torch.empty(spec["shape"], dtype=dtype)
    return torch.frombuffer(body, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin).view(spec["shape"])


def _read_json(store: ExpertStore, name: str) -> dict[str, Any]:
    path = store.path / name
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _eos_token_ids(config: Any, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The generation configuration's word, which chat models extend, else the model's."""
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)
