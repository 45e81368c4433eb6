"""Our experts behind transformers' `ExpertsInterface`: the one seam between a router and the expert kernels.

Every (token, choice) partial is weighted in float32 and summed in ascending expert id, whatever the order in which
experts arrive, so that a token's sum never depends on budget, policy, prefetch or batch mates (law 7).
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Container, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from expertd_engine.kernels.library import ExpertsCall
from expertd_engine.model.substitution import Met, Substituted
from expertd_engine.paths import PathShape, Routes

EXPERTS_NAME = "expertd"

FEW_ROWS = 32
"""Up to this many rows a layer computes experts in the order they arrive, keeping every (token, choice) partial until
the sum; above, in ascending order, where partials would take more memory than the waiting saves."""

Int32s: TypeAlias = NDArray[np.int32]
Floats: TypeAlias = NDArray[np.float32]


class Leases(Protocol):
    """What a layer holds while it computes; `experts.cache.LayerLeases` says more."""

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
class Pairs:
    """The (token, choice) pairs of a layer, or of some of its experts, by ascending expert, then row.

    Pairs `begin[i]:begin[i + 1]` chose `experts[i]`.
    """

    experts: list[int]
    begin: list[int]
    rows: Int32s
    weights: Floats

    @classmethod
    def of(cls, top_k_index: NDArray[np.int64], top_k_weights: Floats) -> Pairs:
        """`[T, K]` each."""
        rows, top_k = top_k_index.shape
        if rows == 1:  # decoding one sequence: most steps there are
            order = top_k_index[0].argsort(kind="stable")
            weights = np.ascontiguousarray(top_k_weights[0, order], np.float32)
            return cls(top_k_index[0, order].tolist(), list(range(top_k + 1)), np.zeros(top_k, np.int32), weights)
        flat = top_k_index.reshape(-1)
        order = flat.argsort(kind="stable")
        chosen = flat[order]
        first = np.flatnonzero(np.r_[True, chosen[1:] != chosen[:-1]]) if len(flat) else np.zeros(0, np.int64)
        rows = (order // top_k).astype(np.int32)
        weights = np.ascontiguousarray(top_k_weights.reshape(-1)[order], np.float32)
        return cls(chosen[first].tolist(), [*first.tolist(), len(flat)], rows, weights)

    def counts(self) -> list[int]:
        """How many chose each expert."""
        return [last - first for first, last in pairwise(self.begin)]

    def select(self, indices: Sequence[int]) -> tuple[Pairs, NDArray[np.int64]]:
        """The pairs of `experts[i]` for i in `indices` (ascending), and where each stands among all pairs."""
        spans = [(self.begin[i], self.begin[i + 1]) for i in indices]
        places = np.concatenate([np.arange(first, last) for first, last in spans])
        begin = np.cumsum([0, *(last - first for first, last in spans)]).tolist()
        return Pairs([self.experts[i] for i in indices], begin, self.rows[places], self.weights[places]), places


@dataclass(frozen=True, slots=True)
class LaterCall:
    """The arguments of a native call, and all that they point to."""

    call: ExpertsCall
    keep: Sequence[Any]


class Later:
    """A layer's experts, all at hand and leased, that the next native call computes on its way."""

    def __init__(self, call: LaterCall, leases: Leases, num_experts: int, held: ExitStack) -> None:
        self.call = call
        self._leases = leases
        self._num_experts = num_experts
        self._held = held

    def computed(self) -> None:
        """The call has returned."""
        self._leases.release(range(self._num_experts))
        self._held.close()

    def abandon(self) -> None:
        """There will be no such call."""
        self._held.close()


class _NoLeases:
    """Of experts that others hold."""

    def take(self) -> list[tuple[int, int]]:
        return []

    def release(self, indices: Iterable[int]) -> None:
        return None


_NO_LEASES = _NoLeases()


class ExpertKernel(Protocol):
    """Computes the experts of one layer from slots."""

    compute_dtype: torch.dtype
    """Of the rows it takes."""

    def add(self, x: torch.Tensor, pairs: Pairs, slots: Sequence[int], out: torch.Tensor) -> None:
        """Add the weighted results for `x` `[T, H]` to `out` (float32 `[T, H]`), expert after expert."""
        ...

    def later(self, x: torch.Tensor, pairs: Pairs, slots: Sequence[int], out: torch.Tensor) -> LaterCall | None:
        """What `add` would do, as arguments for a native call; None where there is none."""
        ...

    def partials(self, x: torch.Tensor, pairs: Pairs, slots: Sequence[int]) -> torch.Tensor:
        """Each pair's weighted result, float32 `[P, H]`, as `add` would add it."""
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
    def limits(self) -> Floats:
        """What each row of the step may lose in a layer, `[T]`."""
        ...

    shared_by: int

    def refresh(self) -> None:
        """Native code is about to run: take in what has arrived."""
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


class MoELayer:
    """One MoE layer's experts. Hangs on the experts module as `expertd_layer`; `step` is set for each step."""

    def __init__(self, layer: int, kernel: ExpertKernel) -> None:
        self.layer = layer
        self.kernel = kernel
        self.step: StepRoutes | None = None

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """`hidden` `[T, H]`, `top_k_index` and `top_k_weights` `[T, K]` to the weighted sums `[T, H]`, as the module
        would give them; rows of padding get zeros.
        """
        assert self.step is not None, "an experts module ran outside a step"
        rows = self.step.num_rows
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        self.compute(hidden[:rows], top_k_index[:rows], top_k_weights[:rows].float(), out[:rows])
        return out.to(hidden.dtype)

    def compute(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Add the weighted sums to `out` (float32 `[T, H]`). Every row of `hidden` is real."""
        later = self.compute_or_prepare(hidden, top_k_index, top_k_weights, out, may_prepare=False)
        assert later is None

    def compute_or_prepare(
        self,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        out: torch.Tensor,
        *,
        may_prepare: bool = True,
    ) -> Later | None:
        """As `compute`; or, where all experts are at hand, what is left to be called. The caller ends it either way."""
        step = self.step
        assert step is not None, "a layer ran outside a step"
        if step.reroute is not None:
            top_k_index, top_k_weights = step.reroute.route(self.layer, hidden, top_k_index, top_k_weights)
        chosen: NDArray[np.int64] = top_k_index.numpy()
        if step.routes is not None:
            chosen = step.routes.route(self.layer, len(chosen))
        for watch in step.watches:
            watch.routed(self.layer, chosen, hidden)
        pairs = Pairs.of(chosen, top_k_weights.numpy())
        x = hidden.to(self.kernel.compute_dtype).contiguous()
        if step.reroute is not None and len(x) <= FEW_ROWS:
            held_slots = step.reroute.slots(self.layer, pairs.experts, pairs.counts())
            if held_slots is not None:
                return self._at_hand(x, pairs, held_slots, out, may_prepare)
        scanned = step.scanned(pairs.experts, chosen)
        with ExitStack() as held:
            asked = step.source.lease(self.layer, pairs.experts, pairs=pairs.counts(), scanned=scanned)
            leases = held.enter_context(asked)
            if len(x) > FEW_ROWS:
                self._in_order(x, pairs, leases, out)
                return None
            taken = leases.take()
            slots = [slot for _, slot in taken]
            if may_prepare and len(taken) == len(pairs.experts):
                call = self.kernel.later(x, pairs, slots, out)
                if call is not None:
                    return Later(call, leases, len(taken), held.pop_all())
            self._as_they_come(x, pairs, leases, taken, out)
        return None

    def _at_hand(
        self, x: torch.Tensor, pairs: Pairs, slots: Sequence[int], out: torch.Tensor, may_prepare: bool
    ) -> Later | None:
        """Compute or prepare experts that stay where they are without a lease of the step's."""
        call = self.kernel.later(x, pairs, slots, out) if may_prepare else None
        if call is None:
            self.kernel.add(x, pairs, slots, out)
            return None
        return Later(call, _NO_LEASES, len(slots), ExitStack())

    def _in_order(self, x: torch.Tensor, pairs: Pairs, leases: Leases, out: torch.Tensor) -> None:
        at_hand: dict[int, int] = {}
        following = 0
        while following < len(pairs.experts):
            at_hand.update(leases.take())
            ready = []
            while following in at_hand:
                ready.append(following)
                following += 1
            if ready:
                self.kernel.add(x, pairs.select(ready)[0], [at_hand.pop(i) for i in ready], out)
                leases.release(ready)

    def _as_they_come(
        self, x: torch.Tensor, pairs: Pairs, leases: Leases, taken: list[tuple[int, int]], out: torch.Tensor
    ) -> None:
        if len(taken) == len(pairs.experts):
            self.kernel.add(x, pairs, [slot for _, slot in taken], out)
            leases.release(range(len(taken)))
            return
        partials = torch.empty(len(pairs.rows), out.shape[1])
        missing = len(pairs.experts)
        while True:
            ready = [index for index, _ in taken]
            selected, places = pairs.select(ready)
            partials[torch.from_numpy(places)] = self.kernel.partials(x, selected, [slot for _, slot in taken])
            leases.release(ready)
            missing -= len(ready)
            if not missing:
                break
            taken = leases.take()
        order = torch.from_numpy(pairs.rows.argsort(kind="stable")).view(len(x), -1)
        for choice in order.T:  # each row's pairs by ascending expert
            out += partials[choice]


def experts_function(
    module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What is registered in `ExpertsInterface` under `EXPERTS_NAME`: shapes as `MoELayer.forward`."""
    layer: MoELayer = module.expertd_layer  # type: ignore[assignment]  # a plain attribute, put there by the loader
    return layer.forward(hidden, top_k_index, top_k_weights)
