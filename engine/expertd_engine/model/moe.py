"""Our experts behind transformers' `ExpertsInterface`: the one seam between a router and the expert kernels.

Every (token, choice) partial is weighted in float32 and summed in ascending expert id, whatever the order in which
experts arrive, so that a token's sum never depends on budget, policy, prefetch or batch mates (law 7).
"""

from __future__ import annotations

from collections.abc import Container, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Protocol

import torch
from torch.nn.functional import linear

from expertd_engine.experts.store_format import RecordLayout

EXPERTS_NAME = "expertd"

ROW_MULTIPLE = 4
"""Matrix products give other bits for fewer rows than four and, in float32, for the last `rows mod 4`; in bfloat16 only
now and then (one number in ten thousand at 576 × 1536, in a batch of one). So rows are padded to a multiple of four."""

TENSOR_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LeaseSource(Protocol):
    """Where a layer gets its experts from: the expert cache, or one stand-in record while the box is measured."""

    def lease_each(
        self, layer: int, experts: Sequence[int], *, scanned: Container[int] = ()
    ) -> Generator[tuple[int, int]]:
        """Yield `(expert, slot)` in the order of `experts`; the slot holds the record until the next iteration."""
        ...


class SlotViews:
    """Tensors over slots, made once per (slot, layout) and kept: they are addresses, not copies."""

    def __init__(self, slab: memoryview, slot_bytes: int, layouts: Sequence[RecordLayout]) -> None:
        self._slab = slab
        self._slot_bytes = slot_bytes
        self._layouts = layouts
        self._views: dict[tuple[int, int], Mapping[str, torch.Tensor]] = {}

    def get(self, slot: int, layout: int) -> Mapping[str, torch.Tensor]:
        """The record's tensors by parameter name."""
        key = (slot, layout)
        if key not in self._views:
            self._views[key] = {
                spec.name: torch.frombuffer(
                    self._slab,
                    dtype=TENSOR_DTYPES[spec.dtype],
                    count=_product(spec.shape),
                    offset=slot * self._slot_bytes + spec.offset,
                ).view(spec.shape)
                for spec in self._layouts[layout].tensors
            }
        return self._views[key]


class StepRoutes:
    """What the layers of the running step share: how many rows are real, and where experts come from."""

    def __init__(self, num_rows: int, source: LeaseSource, *, decode_rows: Sequence[int] | None = None) -> None:
        self.num_rows = num_rows
        """Rows of the batch; what lies beyond is padding and reaches no expert."""
        self.source = source
        self._decode_rows = None if decode_rows is None else torch.tensor(decode_rows, dtype=torch.long)
        """Rows of decoding sequences; None: all are."""
        self.activations: dict[int, int] = {}
        """(token, choice) pairs by MoE layer."""

    def scanned(self, experts: Iterable[int], top_k_index: torch.Tensor) -> Container[int]:
        """Those of `experts` that prompt tokens alone chose: they must not flush the decode working set (law 5)."""
        if self._decode_rows is None:
            return ()
        return set(experts).difference(top_k_index.index_select(0, self._decode_rows).flatten().tolist())


class MoELayer:
    """One MoE layer's experts function. Hangs on the experts module as `expertd_layer`; `step` is set for each step."""

    def __init__(self, layer: int, layout: int, views: SlotViews) -> None:
        self.layer = layer
        self.layout = layout
        self.views = views
        self.step: StepRoutes | None = None

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden` `[T, H]`, `top_k_index` and `top_k_weights` `[T, K]` to the weighted sums `[T, H]`."""
        step = self.step
        assert step is not None, "an experts module ran outside a step"
        num_rows, top_k = step.num_rows, top_k_index.shape[-1]
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        pairs = top_k_index[:num_rows].flatten()
        order = pairs.argsort(stable=True)
        experts, counts = (t.tolist() for t in pairs.unique(return_counts=True))
        step.activations[self.layer] = len(pairs)
        weights = top_k_weights[:num_rows].flatten().float().index_select(0, order).unsqueeze(1)
        rows = order // top_k
        begin = 0
        scanned = step.scanned(experts, top_k_index)
        with closing(step.source.lease_each(self.layer, experts, scanned=scanned)) as leased:
            for (_, slot), count in zip(leased, counts, strict=True):
                mine = slice(begin, begin + count)
                begin += count
                record = self.views.get(slot, self.layout)
                if count == num_rows:  # every token chose it, in order: no copy of the rows
                    partial = expert_ffn(module, record, hidden[:num_rows])
                    out[:num_rows] += partial.mul_(weights[mine])
                else:
                    partial = expert_ffn(module, record, hidden.index_select(0, rows[mine]))
                    out.index_add_(0, rows[mine], partial.mul_(weights[mine]))
        return out.to(hidden.dtype)


def experts_function(
    module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What is registered in `ExpertsInterface` under `EXPERTS_NAME`: shapes as `MoELayer.forward`."""
    layer: MoELayer = module.expertd_layer  # type: ignore[assignment]  # a plain attribute, put there by the loader
    return layer.forward(module, hidden, top_k_index, top_k_weights)


def expert_ffn(module: torch.nn.Module, record: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One expert on `x` `[N, H]`: the same operations as transformers' eager experts, returned in float32 `[N, H]`.

    The module's class says how its parameters lie (`has_gate`, `is_transposed`, `_apply_gate`;
    `integrations/moe.py`), so no family is named here.
    """
    num_rows = len(x)
    x = _pad_rows(x)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _project(module, record, first, x)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # type: ignore[operator]  # untyped
    result = _project(module, record, "down_proj", inner)[:num_rows]
    if getattr(module, "has_post_expert_norm", False):  # transformers 5.17 has no such flag
        result = module.post_expert_norm(result)  # type: ignore[operator]  # untyped
    assert isinstance(result, torch.Tensor)
    return result.float()


def _project(module: torch.nn.Module, record: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    weight = record[name]
    return linear(x, weight.T if module.is_transposed else weight, record.get(f"{name}_bias"))


def _pad_rows(x: torch.Tensor) -> torch.Tensor:
    missing = -len(x) % ROW_MULTIPLE
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
