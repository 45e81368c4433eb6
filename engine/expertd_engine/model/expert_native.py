"""Experts on the native kernels: one call for all routed (token, choice) pairs of a layer that are at hand.

The arithmetic is the library's (`kernels/native/expertd_kernels.h`): float32 rows in and out, int8 activations in
groups of 32 where weights are integers.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from expertd_engine.experts.store_format import RecordLayout
from expertd_engine.kernels.library import ACTIVATIONS, FORMATS, ExpertLayout, ExpertsCall, Pool, record_addresses
from expertd_engine.model.activations import PLAIN
from expertd_engine.model.expert_torch import SlotViews, gated
from expertd_engine.model.moe import LaterCall, Pairs

_CLOSE = 1e-5
"""Largest relative difference between a module's activation and one of ours, float32 both, for them to be the same."""


class Unsupported(Exception):
    """The native kernels cannot compute these experts; the text says why."""


class NativeExperts:
    """The `ExpertKernel` of one layer."""

    compute_dtype = torch.float32

    def __init__(self, pool: Pool, layout: ExpertLayout, views: SlotViews) -> None:
        self._pool = pool
        self.layout = layout
        self._slab = views.slab
        self.slot_zero = ctypes.addressof(ctypes.c_char.from_buffer(views.slab))
        self.slot_stride = views.slot_bytes

    def later(self, x: torch.Tensor, pairs: Pairs, slots: Sequence[int], out: torch.Tensor) -> LaterCall:
        """What `add` would do, for a native call that does it and more."""
        assert out.is_contiguous()
        begin = np.array(pairs.begin, np.int32)
        records = self._records(slots)
        arrays = (begin.ctypes.data, pairs.rows.ctypes.data, pairs.weights.ctypes.data)
        call = ExpertsCall(
            *(ctypes.pointer(self.layout), x.data_ptr(), len(x), len(slots), ctypes.addressof(records)),
            *(*arrays, out.data_ptr(), None),
        )
        return LaterCall(call, (x, pairs, begin, records, out))

    def add(self, x: torch.Tensor, pairs: Pairs, slots: Sequence[int], out: torch.Tensor) -> None:
        assert out.is_contiguous()
        self._run(x, pairs, slots, out=out.data_ptr())

    def partials(self, x: torch.Tensor, pairs: Pairs, slots: Sequence[int]) -> torch.Tensor:
        results = torch.empty(len(pairs.rows), x.shape[1])
        self._run(x, pairs, slots, partials=results.data_ptr())
        return results

    def _run(
        self,
        x: torch.Tensor,
        pairs: Pairs,
        slots: Sequence[int],
        *,
        out: int | None = None,
        partials: int | None = None,
    ) -> None:
        begin = np.array(pairs.begin, np.int32)
        records = self._records(slots)
        self._pool.moe(
            self.layout,
            x.data_ptr(),
            len(x),
            records,
            begin.ctypes.data,
            pairs.rows.ctypes.data,
            pairs.weights.ctypes.data,
            out=out,
            partials=partials,
        )

    def _records(self, slots: Sequence[int]) -> Any:
        return record_addresses([self.slot_zero + slot * self.slot_stride for slot in slots])


def expert_layout(module: torch.nn.Module, record: RecordLayout) -> ExpertLayout:
    """What the kernels need to know of a layer's records. Raises Unsupported."""
    specs = {spec.name: spec for spec in record.tensors}
    if getattr(module, "has_post_expert_norm", False):  # transformers 5.17 has no such flag
        raise Unsupported("a norm follows each expert")
    matrices = [specs[name] for name in ("gate_proj", "up_proj", "down_proj") if name in specs]
    formats = {spec.dtype for spec in matrices}
    if len(formats) > 1:
        raise Unsupported(f"its matrices are in several formats: {', '.join(sorted(formats))}")
    activation, alpha, limit = find_activation(module)
    hidden, inner = specs["down_proj"].shape

    def offset(name: str) -> int:
        return specs[name].offset if name in specs else -1

    return ExpertLayout(
        *(hidden, inner, FORMATS[formats.pop()], ACTIVATIONS[activation], alpha, limit),
        *(offset(f"{name}_proj") for name in ("gate", "up", "down")),
        *(offset(f"{name}_proj_bias") for name in ("gate", "up", "down")),
    )


def find_activation(module: torch.nn.Module) -> tuple[str, float, float]:
    """The kernels' name for what the experts module does between its matrices, and its alpha and limit.

    Found by trying: families share a handful of functions under many names. Raises Unsupported.
    """
    gate = torch.linspace(-12, 12, 4096).view(-1, 64)
    up = gate.flip(0).flip(1) * 0.75 + 0.1
    theirs = gated(module, gate, up) if module.has_gate else module.act_fn(up)  # type: ignore[operator]  # untyped
    alpha, limit = float(getattr(module, "alpha", 0.0)), float(getattr(module, "limit", 0.0) or math.inf)
    for name in ACTIVATIONS:
        ours = _activated(name, gate if module.has_gate else None, up, alpha, limit)
        if ours is not None and torch.allclose(ours, theirs, rtol=_CLOSE, atol=_CLOSE):
            return name, alpha, limit
    raise Unsupported("its activation is none of " + ", ".join(ACTIVATIONS))


def _activated(
    name: str, gate: torch.Tensor | None, up: torch.Tensor, alpha: float, limit: float
) -> torch.Tensor | None:
    """What the kernel of that name computes; None where it needs a gate that is not there."""
    if name in PLAIN:
        return PLAIN[name](up) if gate is None else PLAIN[name](gate) * up
    if gate is None:
        return None
    held = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * held * torch.sigmoid(alpha * held)
