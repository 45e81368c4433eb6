"""From a loaded model to its description on the device: matched and proved on the CPU, then carried over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expertd_engine.errors import ModelError
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.kernels.cuda.experts import ExpertLayout
from expertd_engine.model.attention import ShapeRecorder
from expertd_engine.model.cuda_layer import Carrier
from expertd_engine.model.cuda_modules import DeviceModules
from expertd_engine.model.cuda_program import DenseSide, KernelLayers
from expertd_engine.model.expert_native import Unsupported, find_activation
from expertd_engine.model.kv_storage import LayerShape
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.native_build import build_native
from expertd_engine.model.native_witness import NotMatched, stood_in


@dataclass(frozen=True, slots=True, eq=False)
class DeviceParts:
    """A model's dense weights on the device, and what its steps consist of."""

    shapes: Sequence[LayerShape]
    dense: DenseSide
    layouts: Sequence[ExpertLayout]
    """Of each MoE layer's records."""
    experts: int
    """Of the layer that has most."""
    top_k: int
    dtype: torch.dtype
    """Of keys, values, and rows that matrices read."""
    not_matched: str | None
    """Why transformers' modules compute all but the experts; None where kernels do."""


def build_parts(
    loaded: LoadedModel, index: StoreIndex, block_tokens: int, max_positions: int, device: torch.device
) -> DeviceParts:
    """Raises ModelError with the reason why the model cannot be computed on a device."""
    # Quantised matrices are multiplied by bfloat16 rows: float32 is for the yardstick alone.
    dtype = torch.float32 if index.dense_format == "float32" else torch.bfloat16
    shapes, layouts = learn_shapes(loaded), _layouts(loaded, index, device)
    dense: DenseSide
    not_matched = None
    try:
        native = build_native(loaded, shapes, block_tokens, max_positions)
        carrier = Carrier(device)
        dense = KernelLayers([carrier.layer(layer) for layer in native.layers], carrier.ends(native.ends))
    except NotMatched as reason:
        not_matched, dense = str(reason), DeviceModules(loaded, device, dtype)
    experts = max(layer.num_experts for layer in index.layers)
    return DeviceParts(shapes, dense, layouts, experts, index.top_k, dtype, not_matched)


def _layouts(loaded: LoadedModel, index: StoreIndex, device: torch.device) -> list[ExpertLayout]:
    """Of each MoE layer; ModelError for experts that no kernel computes."""
    name = "the model"
    try:
        if loaded.pregating is not None:
            raise Unsupported("its router runs ahead of its layers, on the processor")
        layouts = []
        for entry, module in zip(index.layers, loaded.moe_modules, strict=True):
            name = f"{entry.module} ({type(module).__name__})"
            layouts.append(ExpertLayout.of(index.layouts[entry.layout], *find_activation(module)))
    except (Unsupported, ValueError) as reason:
        raise ModelError(
            f"{index.name} cannot be computed on {device.type}: {name}: {reason}; give --device cpu"
        ) from None
    return layouts


def learn_shapes(loaded: LoadedModel) -> list[LayerShape]:
    """What each attention layer stores, from one pass over stand-ins for the experts."""
    recorder = ShapeRecorder()
    zeros = torch.zeros(1, 4, dtype=torch.long)
    with torch.inference_mode(), stood_in(loaded):
        loaded.model(input_ids=zeros, position_ids=zeros, use_cache=False, expertd_batch=recorder)
    return recorder.in_order()
