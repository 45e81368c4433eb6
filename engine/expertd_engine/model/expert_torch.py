"""Experts in plain torch, for boxes without the native library and as what it is checked against.

The same operations as transformers' eager experts, on records as the store has them: gate and up apart, each matrix
`[outputs, inputs]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn.functional import linear

from expertd_engine.experts.store_format import RecordLayout, TensorSpec
from expertd_engine.kernels.formats import QUANTISED, dequantise, packed_bytes
from expertd_engine.model.moe import Pairs
from expertd_engine.model.numerics import ROW_MULTIPLE

TENSOR_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SlotViews:
    """Tensors over slots, made once per (slot, layout) and kept: they are addresses, not copies.

    Quantised tensors are dequantised anew each time they are asked for, into float32: slow, and right.
    """

    def __init__(self, slab: memoryview, slot_bytes: int, layouts: Sequence[RecordLayout]) -> None:
        self.slab = slab
        self.slot_bytes = slot_bytes
        self.layouts = layouts
        self._views: dict[tuple[int, int], Mapping[str, torch.Tensor]] = {}

    def get(self, slot: int, layout: int) -> Mapping[str, torch.Tensor]:
        """The record's tensors by name, as the kernels here compute with them."""
        specs = self.layouts[layout].tensors
        raw = self.raw(slot, layout)
        return {spec.name: _as_floats(raw[spec.name], spec) for spec in specs}

    def raw(self, slot: int, layout: int) -> Mapping[str, torch.Tensor]:
        """The record's tensors by name, as they lie: bytes (uint8) where they are quantised."""
        key = (slot, layout)
        if key not in self._views:
            specs = self.layouts[layout].tensors
            self._views[key] = {spec.name: self._view(spec, slot * self.slot_bytes + spec.offset) for spec in specs}
        return self._views[key]

    def _view(self, spec: TensorSpec, offset: int) -> torch.Tensor:
        if spec.dtype in QUANTISED:
            count = packed_bytes(spec.dtype, *spec.shape)
            return torch.frombuffer(self.slab, dtype=torch.uint8, count=count, offset=offset)
        dtype = TENSOR_DTYPES[spec.dtype]
        return torch.frombuffer(self.slab, dtype=dtype, count=math.prod(spec.shape), offset=offset).view(spec.shape)


class TorchExperts:
    """The `ExpertKernel` of one layer's `module`, which says how gate and up are combined (`_apply_gate`;
    transformers' `integrations/moe.py`), so no family is named here.
    """

    def __init__(self, module: torch.nn.Module, views: SlotViews, layout: int) -> None:
        self._module = module
        self._views = views
        self._layout = layout
        specs = {spec.name: spec for spec in views.layouts[layout].tensors}
        self.compute_dtype = TENSOR_DTYPES.get(specs["down_proj"].dtype, torch.float32)

    def later(self, x: torch.Tensor, pairs: Pairs, slots: Sequence[int], out: torch.Tensor) -> None:
        return None

    def add(self, x: torch.Tensor, pairs: Pairs, slots: Sequence[int], out: torch.Tensor) -> None:
        rows = torch.from_numpy(pairs.rows).long()
        for i, slot in enumerate(slots):
            mine = slice(pairs.begin[i], pairs.begin[i + 1])
            out.index_add_(0, rows[mine], self._partial(x, pairs, i, slot))

    def partials(self, x: torch.Tensor, pairs: Pairs, slots: Sequence[int]) -> torch.Tensor:
        return torch.cat([self._partial(x, pairs, i, slot) for i, slot in enumerate(slots)])

    def _partial(self, x: torch.Tensor, pairs: Pairs, index: int, slot: int) -> torch.Tensor:
        mine = slice(pairs.begin[index], pairs.begin[index + 1])
        record = self._views.get(slot, self._layout)
        partial = expert_ffn(self._module, record, x.index_select(0, torch.from_numpy(pairs.rows[mine])))
        return partial.mul_(torch.from_numpy(pairs.weights[mine]).unsqueeze(1))


def expert_ffn(module: torch.nn.Module, record: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One expert on `x` `[N, H]`, returned in float32 `[N, H]`."""
    num_rows = len(x)
    x = _pad_rows(x)
    inner = _project(record, "up_proj", x)
    inner = gated(module, _project(record, "gate_proj", x), inner) if module.has_gate else module.act_fn(inner)  # type: ignore[operator]  # untyped
    result = _project(record, "down_proj", inner)[:num_rows]
    if getattr(module, "has_post_expert_norm", False):  # transformers 5.17 has no such flag
        result = module.post_expert_norm(result)  # type: ignore[operator]  # untyped
    assert isinstance(result, torch.Tensor)
    return result.float()


def gated(module: torch.nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The module's own activation, which takes gate and up as its parameter has them: joined, or one by one in turn."""
    both = torch.cat([gate, up], dim=-1) if module.is_concatenated else torch.stack([gate, up], dim=-1).flatten(-2)
    result = module._apply_gate(both)  # type: ignore[operator]  # untyped
    assert isinstance(result, torch.Tensor)
    return result


def _project(record: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias = record[name], record.get(f"{name}_bias")
    return linear(x, weight, None if bias is None else bias.to(weight.dtype))


def _pad_rows(x: torch.Tensor) -> torch.Tensor:
    missing = -len(x) % ROW_MULTIPLE
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def _as_floats(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    if spec.dtype not in QUANTISED:
        return tensor
    return torch.from_numpy(np.ascontiguousarray(dequantise(tensor.numpy(), spec.dtype, *spec.shape)))
