"""The routed experts of a step on the device: read where the table says they lie, or as they are brought in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertd_engine.experts.device_staging import Chunk
from expertd_engine.kernels.cuda.experts import ExpertLayout, decode_tiles, experts_decode
from expertd_engine.kernels.cuda.experts_prefill import PairGroups, combine, experts_prefill
from expertd_engine.kernels.cuda.host_experts import Asking, Mailbox
from expertd_engine.kernels.cuda.resolve import ExpertScratch, TablePointers, publish, resolve
from expertd_engine.kernels.given import take


class GivenRoutes:
    """Routes that take the place of the routers' choices, for measurements; weights stay the routers' own."""

    def __init__(self, layers: int, rows: int, top_k: int, device: torch.device) -> None:
        self._host = torch.zeros(layers, rows, top_k, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(layers, rows, top_k, dtype=torch.int32, device=device)
        self._numbers = self._host.numpy()

    def fill(self, routes: NDArray[np.int64]) -> None:
        """Write down the step's routes `[rows, layers, top_k]`, for the next `take`."""
        self._numbers[:, : len(routes)] = routes.transpose(1, 0, 2)

    def take(self) -> None:
        """Among the first work of a step. May be captured in a graph."""
        take(self._host, self._device)

    def of(self, layer: int, rows: int) -> Tensor:
        """int32 `[rows, top_k]`"""
        return self._device[layer, :rows]


class TableExperts:
    """Experts of steps of few rows, each read where its entry says: from the card, or over the link."""

    def __init__(
        self, layouts: Sequence[ExpertLayout], table: TablePointers, scratches: Mapping[int, ExpertScratch],
        num_rows: Tensor, given: GivenRoutes | None, mailbox: Mailbox | None = None,
    ) -> None:  # fmt: skip
        """`layouts[m]` is that of MoE layer m; `scratches` are by number of rows, since kernels launch a program for
        every expert that may be met. `num_rows` int32 `[1]`: real rows of the step. `mailbox`: the processor
        computes what is missing, or a part of it."""
        self._layouts, self._table, self._scratches = layouts, table, scratches
        self._num_rows, self._given, self._mailbox = num_rows, given, mailbox

    def add(self, moe: int, x: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
        """See `cuda_program.Experts`."""
        scratch = self._scratches[len(index)]
        chosen = index if self._given is None else self._given.of(moe, len(index))
        box = self._mailbox
        resolve(self._table, moe, chosen, self._num_rows, scratch, left=None if box is None else box.left)
        experts_decode(
            self._layouts[moe], self._table, x, weights, scratch, out, shares=box is not None and box.shares,
            asking=None if box is None else Asking(box, moe),
        )  # fmt: skip

    def finish(self, rows: int) -> None:
        """Publish what landed in the last layer of a step of `rows` rows."""
        publish(self._table, len(self._layouts) - 1, self._scratches[rows])


class Stage(Protocol):
    """One step's experts, layer by layer: `experts.device_staging.Staging`."""

    def resident(self, layer: int) -> Chunk: ...
    def chunks(self, layer: int, counts: Tensor) -> Iterator[Chunk]: ...


class StagedExperts:
    """Experts of steps of many rows: those at hand first, then the others as they arrive."""

    def __init__(
        self, layouts: Sequence[ExpertLayout], num_experts: int, inner: Tensor, partials: Tensor,
        given: GivenRoutes | None, *, invariant: bool,
    ) -> None:  # fmt: skip
        """`inner` `[P, I]` and float32 `partials` `[P, H]` have room for the pairs of the largest step. `invariant`:
        sums have the order that steps of few rows give them."""
        self._tiles = [
            (decode_tiles(layout, layout.hidden), decode_tiles(layout, layout.inner)) if invariant else None
            for layout in layouts
        ]
        self._layouts, self._num_experts = layouts, num_experts
        self._inner, self._partials, self._given = inner, partials, given
        self._staging: Stage | None = None
        self.counts = torch.zeros(len(layouts), num_experts, dtype=torch.int64, device=inner.device)
        """How many pairs chose each expert in the last step."""

    def begin(self, staging: Stage) -> None:
        """Experts of the step about to run come by `staging`."""
        self._staging = staging

    def add(self, moe: int, x: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
        """See `cuda_program.Experts`."""
        assert self._staging is not None
        chosen = index if self._given is None else self._given.of(moe, len(index))
        groups = PairGroups.of(chosen, self._num_experts)
        self.counts[moe].copy_(groups.count)
        partials = self._partials[: chosen.numel()]
        self._compute(moe, x, weights, groups, self._staging.resident(moe), partials)
        for chunk in self._staging.chunks(moe, groups.count):
            self._compute(moe, x, weights, groups, chunk, partials)
        combine(groups, partials, out)

    def _compute(
        self, moe: int, x: Tensor, weights: Tensor, groups: PairGroups, chunk: Chunk, partials: Tensor
    ) -> None:
        if chunk.count:
            inner = self._inner[: len(partials)]
            layout = self._layouts[moe]
            experts_prefill(
                layout, x, weights, groups, chunk.experts, chunk.addresses, inner, partials, tiles=self._tiles[moe]
            )
