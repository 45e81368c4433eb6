"""What the layers of a running step share: where experts come from, and who has a say in which are chosen."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Container, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from expertd_engine.model.substitution import Met, Substituted
from expertd_engine.model.virtual_counts import RowSums, Tally
from expertd_engine.paths import PathShape, Routes

Floats: TypeAlias = NDArray[np.float32]


class Leases(Protocol):
    """What a layer holds while it computes; `experts.leases.LayerLeases` says more."""

    def take(self) -> list[tuple[int, int]]:
        """`(index, slot)` of what has been granted, ascending; waits for at least one."""
        ...

    def release(self, indices: Iterable[int]) -> None:
        """The layer has done with these."""
        ...


class LeaseSource(Protocol):
    """Where a layer gets its experts from: the expert cache, or one stand-in record while the box is measured."""

    def lease(
        self, layer: int, experts: Sequence[int], *, pairs: Sequence[int], scanned: Container[int] = ()
    ) -> AbstractContextManager[Leases]:
        """Leases on `experts` (ascending) for the block; `pairs` (token, choice) pairs chose each."""
        ...


class RouteSource(Protocol):
    """Chooses experts in the place of the model's routers, for measurements on generated or recorded routes."""

    def route(self, layer: int, num_rows: int) -> NDArray[np.int64]:
        """Expert ids `[num_rows, K]`, distinct in each row, for the rows of the running step at MoE layer `layer`."""
        ...

    def step_routes(self, num_rows: int) -> NDArray[np.int64]:
        """All layers' at once, `[num_rows, layers, K]`."""
        ...


@dataclass(frozen=True, slots=True)
class KnownRoutes:
    """Routes that are known before their step: experts (int64) and weights (float32), `[T][head][choice]`, flat."""

    routes: Routes
    shape: PathShape

    @classmethod
    def of(cls, experts: torch.Tensor, weights: torch.Tensor) -> KnownRoutes:
        """From `[heads, T, K]`."""
        heads, _, top_k = experts.shape
        flat = [tensor.transpose(0, 1).contiguous().numpy().tobytes() for tensor in (experts, weights.float())]
        return cls(Routes(array("q", flat[0]), array("f", flat[1])), PathShape(heads, top_k))

    @property
    def same_everywhere(self) -> bool:
        """Whether one choice holds in all layers."""
        return self.shape.heads == 1

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and weights `[heads, T, K]`, which look at the same memory."""
        size = -1, self.shape.heads, self.shape.top_k
        experts = torch.frombuffer(self.routes.experts, dtype=torch.int64).view(size)
        weights = torch.frombuffer(self.routes.weights, dtype=torch.float32).view(size)
        return experts.transpose(0, 1), weights.transpose(0, 1)

    def put(self, layer: int, experts: torch.Tensor, weights: torch.Tensor) -> None:
        """Write those of an MoE layer to `[T, K]` each, without gaps."""
        if not self.same_everywhere:
            chosen, shares = self.tensors
            experts.copy_(chosen[layer])
            weights.copy_(shares[layer])
            return
        for tensor, values in ((experts, self.routes.experts), (weights, self.routes.weights)):
            address, count = values.buffer_info()
            ctypes.memmove(tensor.data_ptr(), address, count * values.itemsize)


class Reroute(Protocol):
    """Puts other experts in the place of those that the model's router chose: virtual mode."""

    @property
    def runs(self) -> bool:
        """Whether layers may run on without Python: then native code routes by `masks` and `limits`."""
        ...

    @property
    def masks(self) -> Sequence[NDArray[np.bool_]]:
        """Who each MoE layer holds, `[E]` each: always the same memory."""
        ...

    @property
    def places(self) -> Sequence[NDArray[np.int64]]:
        """In which slot each of them is, `[E]` each: always the same memory."""
        ...

    @property
    def limits(self) -> Floats:
        """What each row of the step may lose in a layer, `[T]`."""
        ...

    @property
    def tally(self) -> Tally:
        """What native code adds to as it passes a layer."""
        ...

    @property
    def unit(self) -> float:
        """What is observed now counts for, in scores."""
        ...

    @property
    def row_sums(self) -> RowSums:
        """What native code adds to, by row of the step."""
        ...

    shared_by: int

    def refresh(self) -> None:
        """Native code is about to run."""
        ...

    def ran(self, met: Met) -> None:
        """Layers have run on."""
        ...

    def seen(self, logits: torch.Tensor, substitute: Substitute | None) -> None:
        """Router logits `[T, E]` of the layer about to compute; who replaces choices, where native code can."""
        ...

    def route(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and weights `[T, W]`, W ≥ K, for `hidden` `[T, H]`, from the router's own."""
        ...

    def slots(self, layer: int, experts: Sequence[int], pairs: Sequence[int]) -> list[int] | None:
        """Of experts (ascending) that `pairs` (token, choice) pairs each chose, where they stay without a lease until
        the layer is computed; else None."""
        ...


class Substitute(Protocol):
    """Routes rows of one layer among the experts that it holds."""

    def __call__(
        self,
        logits: torch.Tensor,
        chosen: NDArray[np.int64],
        weights: Floats,
        held: NDArray[np.bool_],
        limits: Floats,
        shared_by: int,
    ) -> Substituted:
        """`logits` `[T, E]`, the router's own `chosen` and `weights` `[T, K]`, `held` `[E]`, `limits` `[T]`."""
        ...


class Watch(Protocol):
    """Looks on while a step is routed, and changes nothing: a recorder, or a predictor."""

    @property
    def sees_hidden(self) -> bool:
        """Whether it wants what the routers saw: then layers do not run on without Python."""
        ...

    def routed(self, layer: int, chosen: NDArray[np.int64], hidden: torch.Tensor | None) -> None:
        """MoE layer `layer` sends rows `hidden` `[T, H]` (None where nobody wants it) to `chosen` `[T, K]`."""
        ...


class StepRoutes:
    """What the layers of the running step share: how many rows are real, and where experts come from."""

    def __init__(
        self,
        num_rows: int,
        source: LeaseSource,
        *,
        decode_rows: Sequence[int] | None = None,
        routes: RouteSource | None = None,
        reroute: Reroute | None = None,
        known: KnownRoutes | None = None,
    ) -> None:
        self.num_rows = num_rows
        """Rows of the batch; what lies beyond is padding and reaches no expert."""
        self.source = source
        self.routes = routes
        """Chooses experts in the router's place, for measurements on generated routes."""
        self.reroute = reroute
        """None: the router's own choices stand."""
        self.watches: Sequence[Watch] = ()
        self.known = known
        """Of a model whose router has run before the step; None for all others."""
        self._decode_rows = None if decode_rows is None else np.array(decode_rows, np.int64)
        """Rows of decoding sequences; None: all are."""

    @property
    def decodes_alone(self) -> bool:
        """Whether no row is of a prompt."""
        return self._decode_rows is None

    def scanned(self, experts: Iterable[int], top_k_index: NDArray[np.int64]) -> Container[int]:
        """Those of `experts` that prompt tokens alone chose: they must not flush the decode working set (law 5)."""
        if self._decode_rows is None:
            return ()
        return set(experts).difference(top_k_index[self._decode_rows].reshape(-1).tolist())
