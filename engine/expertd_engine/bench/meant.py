"""A store's model under plain transformers, in float32, with exactly the weights that its bytes stand for.

What our kernels compute is measured against it. The whole model is in memory: for small ones.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import torch

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.record_file import RecordFile
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import TensorSpec, tensor_bytes
from expertd_engine.families import Model, build_meta_model, find_experts, load_config
from expertd_engine.kernels.formats import QUANTISED, Floats, dequantise
from expertd_engine.model.loader import read_dense
from expertd_engine.weights_plan import plan_quantised

Change: TypeAlias = Callable[[Floats], Floats]
"""What is done to a matrix `[N, K]` before it is used."""


def load_meant(store: ExpertStore, change: Change | None = None) -> Model:
    """The model, in eval mode. `change` is applied to every matrix of experts, and to those dense ones that a quantised
    format would quantise.
    """
    model = build_meta_model(load_config(store.path), torch.float32)
    weights = _dense(store, set(plan_quantised(model, "int8")), change or _same)
    with store.open_records() as file:
        for layer, (name, module) in enumerate(find_experts(model)):
            ids = [ExpertId(layer, expert) for expert in range(store.index.layers[layer].num_experts)]
            records = [_record(store, file, expert, change or _same) for expert in ids]
            for own, _ in module.named_parameters():
                weights[f"{name}.{own}"] = torch.stack([as_parameter(module, own, record) for record in records])
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(False)


def as_parameter(module: torch.nn.Module, name: str, record: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One expert's slice of parameter `name`, as its family has it: what `weights_plan.canonical` takes apart."""
    if not name.startswith("gate_up_proj"):
        tensor = record[name]
    else:
        parts = [record[name.replace("gate_up", part)] for part in ("gate", "up")]
        tensor = torch.cat(parts) if module.is_concatenated else torch.stack(parts, dim=1).flatten(0, 1)
    return tensor.T if module.is_transposed and tensor.dim() == 2 else tensor


def stored_values(stored: memoryview, spec: TensorSpec) -> torch.Tensor:
    """What the bytes of one tensor of a record stand for, in float32."""
    if spec.dtype in QUANTISED:
        rows, cols = spec.shape
        return torch.from_numpy(dequantise(np.frombuffer(stored, np.uint8), spec.dtype, rows, cols))
    return torch.frombuffer(stored, dtype=getattr(torch, spec.dtype)).view(torch.Size(spec.shape)).float()


def _same(weights: Floats) -> Floats:
    return weights


def _record(store: ExpertStore, file: RecordFile, expert: ExpertId, change: Change) -> dict[str, torch.Tensor]:
    buffer = memoryview(mmap.mmap(-1, store.index.record_bytes(expert.layer)))
    file.read_record(expert, buffer)
    tensors = {}
    for spec in store.index.layouts[store.index.layers[expert.layer].layout].tensors:
        values = stored_values(buffer[spec.offset : spec.offset + tensor_bytes(spec.dtype, spec.shape)], spec)
        tensors[spec.name] = torch.from_numpy(change(values.numpy())) if values.dim() == 2 else values
    return tensors


def _dense(store: ExpertStore, matrices: set[str], change: Change) -> dict[str, torch.Tensor]:
    tensors, _ = read_dense(store)
    for name, form in store.index.quantised.items():
        rows, cols = form.shape
        tensors[name] = torch.from_numpy(dequantise(tensors[name].numpy(), form.format, rows, cols))
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return {
        name: torch.from_numpy(change(np.ascontiguousarray(tensor.numpy()))) if name in matrices else tensor
        for name, tensor in floats.items()
    }
