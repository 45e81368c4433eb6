"""Our experts behind transformers' `ExpertsInterface`: the one seam between a router and the expert kernels.

Every (token, choice) partial is weighted in float32 and summed in ascending expert id, whatever the order in which
experts arrive, so that a token's sum never depends on budget, policy, prefetch or batch mates (law 7).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from expertd_engine.kernels.library import ExpertsCall
from expertd_engine.model.step_routes import Leases, StepRoutes

EXPERTS_NAME = "expertd"

FEW_ROWS = 32
"""Up to this many rows a layer computes experts in the order they arrive, keeping every (token, choice) partial until
the sum; above, in ascending order, where partials would take more memory than the waiting saves."""

Int32s: TypeAlias = NDArray[np.int32]
Floats: TypeAlias = NDArray[np.float32]


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
