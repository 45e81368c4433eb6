"""A layer of experts as a GPU has them: records at home and in slots, a table, and the same sums in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertd_engine.experts.store_format import RecordLayout
from expertd_engine.kernels.cuda.experts import ExpertLayout, experts_decode
from expertd_engine.kernels.cuda.resolve import FAR, NEVER, ExpertScratch, Left, TablePointers, publish, resolve
from expertd_engine.kernels.row_order import ROW_FORMATS, quantise_rows
from expertd_engine.model.expert_native import _activated as activated
from expertd_engine.weights_plan import lay_out
from support.interpreter import DEVICE
from support.row_values import dequantise_rows

FORMATS = ("float32", "bfloat16", *ROW_FORMATS)
PAGE = 4096


@dataclass(frozen=True)
class Kind:
    """What a layer's experts are."""

    format: str = "float32"
    activation: str = "silu"
    has_gate: bool = True
    has_bias: bool = False
    hidden: int = 40
    inner: int = 24
    experts: int = 7
    top_k: int = 3
    alpha: float = 1.702
    limit: float = 0.5


class Pages:
    """`count` records of `size` bytes, each at a multiple of a page."""

    def __init__(self, count: int, size: int, *, at_home: bool = False) -> None:
        self.size = size
        room = (count + 1) * size + PAGE
        kind = torch.uint8
        self._all = torch.full((room,), 255, dtype=kind, device="cpu" if at_home else DEVICE)
        if at_home and DEVICE == "cuda":
            self._all = self._all.pin_memory()
        begin = -self._all.data_ptr() % PAGE
        self.bytes = self._all[begin : begin + count * size].view(count, size)
        self.addresses = [self.bytes[nth].data_ptr() for nth in range(count)]


class ExpertWorld:
    """Two layers with the same experts, of which some may be far: `far` of layer 0."""

    def __init__(self, kind: Kind, *, far: Sequence[int] = (), slots: int = 4, free: Sequence[int] = ()) -> None:
        self.kind = kind
        self.rng = np.random.default_rng(3)
        stored = {"bfloat16": "bf16"}.get(kind.format, kind.format)
        self.record = lay_out(self._shapes(), stored, "rows")
        made = [self._expert(self.record) for _ in range(kind.experts)]
        self.values = [values for _, values in made]
        self.resident = Pages(kind.experts, self.record.bytes)
        self.home = Pages(kind.experts, self.record.bytes, at_home=True)
        for nth, (record, _) in enumerate(made):
            self.resident.bytes[nth] = record.to(DEVICE)
            self.home.bytes[nth] = record
        self.slots = Pages(slots, self.record.bytes)
        self.layout = ExpertLayout.of(self.record, kind.activation, kind.alpha, kind.limit)
        self.table = self._table(far, free)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        kind = self.kind
        sides = {"gate_proj": (kind.inner, kind.hidden), "up_proj": (kind.inner, kind.hidden)}
        shapes: dict[str, tuple[int, ...]] = {**sides, "down_proj": (kind.hidden, kind.inner)}
        if kind.has_bias:
            shapes |= {f"{name}_bias": shape[:1] for name, shape in shapes.items()}
        return {name: shape for name, shape in shapes.items() if kind.has_gate or not name.startswith("gate")}

    def _expert(self, layout: RecordLayout) -> tuple[Tensor, dict[str, Tensor]]:
        """A random record, and what its tensors stand for in float64."""
        record, values = np.zeros(layout.bytes, np.uint8), {}
        for spec in layout.tensors:
            weights = self.rng.standard_normal(spec.shape).astype(np.float32) / np.float32(np.sqrt(spec.shape[-1]))
            if spec.dtype in ROW_FORMATS:
                stored = quantise_rows(weights, spec.dtype)
                meant = torch.from_numpy(dequantise_rows(stored, spec.dtype, *spec.shape))
            else:
                meant = torch.from_numpy(weights).to(getattr(torch, spec.dtype))
                stored = meant.view(-1).view(torch.uint8).numpy()
            record[spec.offset : spec.offset + len(stored)] = stored
            values[spec.name] = meant.double()
        return torch.from_numpy(record), values

    def _table(self, far: Sequence[int], free: Sequence[int]) -> TablePointers:
        kind, width = self.kind, self.kind.experts
        entries = torch.zeros(2, width, 2, dtype=torch.int64)
        entries[:, :, 0] = torch.tensor(self.resident.addresses)
        for expert in far:
            entries[0, expert, 0] = self.home.addresses[expert] | FAR
        head = torch.tensor([2**31 - 2], dtype=torch.int64).int()  # counts wrap
        ring = torch.zeros(4, dtype=torch.int32)
        for nth, slot in enumerate(free):
            ring[(int(head) + nth) & 3] = slot
        progress = torch.zeros(1, dtype=torch.int32)
        return TablePointers(
            entries.to(DEVICE),
            torch.tensor(self.slots.addresses, device=DEVICE),
            torch.zeros(len(self.slots.addresses), dtype=torch.int32, device=DEVICE),
            ring.to(DEVICE),
            head.to(DEVICE),
            (head.long() + len(free)).int().to(DEVICE),
            torch.full((2, kind.experts, 4), -9, dtype=torch.int32, device=DEVICE),
            torch.zeros(2, dtype=torch.int32, device=DEVICE),
            progress.pin_memory() if DEVICE == "cuda" else progress,
            torch.zeros(1, dtype=torch.int32, device=DEVICE),
        )

    def rows(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal((count, self.kind.hidden))).to(DEVICE, dtype)

    def routes(self, count: int) -> tuple[Tensor, Tensor]:
        """Experts and weights of `count` rows."""
        chosen = np.stack([self.rng.permutation(self.kind.experts)[: self.kind.top_k] for _ in range(count)])
        weights = self.rng.uniform(0.1, 1.0, chosen.shape)
        return torch.from_numpy(chosen).int().to(DEVICE), torch.from_numpy(weights).float().to(DEVICE)

    def scratch(self, max_rows: int, dtype: torch.dtype) -> ExpertScratch:
        kind = self.kind
        return ExpertScratch.of(
            hidden=kind.hidden, inner=kind.inner, max_rows=max_rows, top_k=kind.top_k, num_experts=kind.experts,
            dtype=dtype, device=DEVICE,
        )  # fmt: skip

    def resolve(
        self, index: Tensor, scratch: ExpertScratch, *, real: int | None = None, layer: int = 0, cut: int = 0
    ) -> None:
        num_rows = torch.tensor([len(index) if real is None else real], dtype=torch.int32, device=DEVICE)
        left = None
        if cut:
            splits = torch.tensor([[(0, cut)] * (self.kind.experts + 1)], dtype=torch.int32, device=DEVICE)
            never = torch.full((1, self.kind.experts), NEVER, dtype=torch.int32, device=DEVICE)
            left = Left(splits, never, torch.zeros(1, dtype=torch.int32, device=DEVICE))
        resolve(self.table, layer, index, num_rows, scratch, left=left)

    def decode(self, x: Tensor, index: Tensor, weights: Tensor, *, real: int | None = None, cut: int = 0) -> Tensor:
        """Layer 0 of one step, from zeros. `cut`: of one missing expert neurons from there on are somebody else's."""
        scratch = self.scratch(len(x), x.dtype)
        out = torch.zeros(x.shape, device=DEVICE)
        self.resolve(index, scratch, real=real, cut=cut)
        experts_decode(self.layout, self.table, x, weights, scratch, out, shares=cut > 0)
        publish(self.table, 0, scratch)
        return out.cpu()

    def expected(self, x: Tensor, index: Tensor, weights: Tensor, cuts: Mapping[int, int] | None = None) -> Tensor:
        """The same in float64. `cuts`: of these experts neurons from there on add nothing."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for row, chosen in enumerate(index.tolist()):
            for choice, expert in enumerate(chosen):
                values = dict(self.values[expert])
                values["down_proj"] = values["down_proj"].clone()
                values["down_proj"][:, (cuts or {}).get(expert, self.kind.inner) :] = 0.0
                out[row] += float(weights[row, choice]) * self._ffn(values, x[row].double().cpu())
        return out

    def _ffn(self, values: dict[str, Tensor], x: Tensor) -> Tensor:
        def project(name: str, rows: Tensor) -> Tensor:
            return values[name] @ rows + values.get(f"{name}_bias", torch.zeros((), dtype=torch.float64))

        gate = project("gate_proj", x) if self.kind.has_gate else None
        inner = activated(self.kind.activation, gate, project("up_proj", x), self.kind.alpha, self.kind.limit)
        assert inner is not None
        return project("down_proj", inner)

    def seen(self) -> list[list[int]]:
        """What `resolve` wrote of layer 0: expert, source, slot, pairs."""
        listed: list[list[int]] = self.table.seen[0, : int(self.table.seen_count[0])].tolist()
        return listed
