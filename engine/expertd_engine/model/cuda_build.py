"""From a loaded model to its description on the device: matched and proved on the CPU, then carried over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expertd_engine.errors import ModelError
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.kernels.cuda.experts import ExpertLayout
from expertd_engine.model.attention import LayerShape, ShapeRecorder
from expertd_engine.model.cuda_layer import Carrier, DeviceEnds, DeviceLayer
from expertd_engine.model.expert_native import Unsupported, find_activation
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.native_build import build_native
from expertd_engine.model.native_witness import NotMatched, stood_in


@dataclass(frozen=True, slots=True, eq=False)
class DeviceParts:
    """A model's dense weights on the device, and what its steps consist of."""

    shapes: Sequence[LayerShape]
    layers: Sequence[DeviceLayer]
    ends: DeviceEnds
    layouts: Sequence[ExpertLayout]
    """Of each MoE layer's records."""
    dtype: torch.dtype
    """Of keys, values, and rows that matrices read."""


def build_parts(
    loaded: LoadedModel, index: StoreIndex, block_tokens: int, max_positions: int, device: torch.device
) -> DeviceParts:
    """Raises ModelError with the reason why the model cannot be computed on a device."""
    shapes = learn_shapes(loaded)
    try:
        if loaded.pregating is not None:
            raise NotMatched("its router runs ahead of its layers, on the processor")
        native = build_native(loaded, shapes, block_tokens, max_positions)
        carrier = Carrier(device)
        layers = [carrier.layer(layer) for layer in native.layers]
        ends = carrier.ends(native.ends)
        layouts = [
            ExpertLayout.of(index.layouts[entry.layout], *find_activation(module))
            for entry, module in zip(index.layers, loaded.moe_modules, strict=True)
        ]
    except (NotMatched, Unsupported) as reason:
        raise ModelError(f"{index.name} cannot be computed on {device.type}: {reason}; give --device cpu") from None
    # Quantised matrices are multiplied by bfloat16 rows: float32 is for the yardstick alone.
    dtype = torch.float32 if index.dense_format == "float32" else torch.bfloat16
    return DeviceParts(shapes, layers, ends, layouts, dtype)


def learn_shapes(loaded: LoadedModel) -> list[LayerShape]:
    """What each attention layer stores, from one pass over stand-ins for the experts."""
    recorder = ShapeRecorder()
    zeros = torch.zeros(1, 4, dtype=torch.long)
    with torch.inference_mode(), stood_in(loaded):
        loaded.model(input_ids=zeros, position_ids=zeros, use_cache=False, expertd_batch=recorder)
    return recorder.in_order()
