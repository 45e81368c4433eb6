"""Runs layer after layer without coming back to Python, for as long as all that they choose is resident.

While a native call runs, nobody takes events in: the ledger is the engine thread's, and that is in the call. So what is
resident when the call begins stays where it is without a lease, and the ledger is told of all uses at the end.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from ctypes import byref, c_int32, c_void_p
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.ledger_base import LedgerBase
from expertd_engine.kernels.library import Pool
from expertd_engine.model.expert_native import NativeExperts
from expertd_engine.model.held_run import HeldMemory
from expertd_engine.model.moe import FEW_ROWS, Later, MoELayer
from expertd_engine.model.native_abi import Block, BlockCalls, Run, Step
from expertd_engine.model.step_routes import Reroute, StepRoutes, Watch


class Residents(Protocol):
    """The part of the expert cache that this needs."""

    @property
    def foresees(self) -> bool:
        """Whether somebody wants to hear of each layer's routes when it has them."""
        ...

    @property
    def ledger(self) -> LedgerBase: ...

    def used_in_passing(self, layers: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Tell of experts that were computed."""
        ...


class LayerRun:
    """The layers of a model over one expert cache. `moe[l]` is the MoE layer that decoder layer l is, or None."""

    def __init__(
        self,
        calls: BlockCalls,
        blocks: Sequence[Block],
        moe: Sequence[int | None],
        layers: Sequence[MoELayer],
        source: Residents,
    ) -> None:
        kernels = [kernel for layer in layers if isinstance(kernel := layer.kernel, NativeExperts)]
        assert len(kernels) == len(layers), "an MoE layer has no native kernel"
        self.source = source
        self._calls = calls
        self._moe = moe
        self._held: HeldMemory | None = None
        self._held_run: Run | None = None
        """The descriptor, but for slots: of the held."""
        self._held_slots: tuple[Any, ...] = ()
        """What it points to."""
        self._described = blocks
        self._top_k = max(block.router.top_k for block in blocks)
        self._chosen = array("q", bytes(8 * len(blocks) * FEW_ROWS * self._top_k))
        self._given = np.zeros((len(blocks), FEW_ROWS * self._top_k), np.int64)
        """Where each layer's rows go whatever their router says, in steps on generated routes."""
        pointers = c_void_p * len(blocks)
        self._blocks = pointers(*map(ctypes.addressof, blocks))
        self._layouts = pointers(*(None if i is None else ctypes.addressof(kernels[i].layout) for i in moe))
        slots = [None if i is None else source.ledger.resident_slots(i).buffer_info()[0] for i in moe]
        self._slots = pointers(*slots)
        self._descriptor = Run(
            *(len(blocks), ctypes.addressof(self._blocks), ctypes.addressof(self._layouts)),
            *(ctypes.addressof(self._slots), kernels[0].slot_zero, kernels[0].slot_stride),
            *(None, self._chosen.buffer_info()[0], FEW_ROWS * self._top_k, None),
        )

    def begin_step(self, routes: StepRoutes, rows: int) -> None:
        """A step of so many rows begins, on its routers' choices or on generated ones."""
        if routes.routes is None:
            self._descriptor.given = None
            return
        given = routes.routes.step_routes(rows)
        for layer, index in enumerate(self._moe):
            if index is not None:
                self._given[layer, : rows * self._top_k] = given[:, index].ravel()
        self._descriptor.given = self._given.ctypes.data

    def forward(self, pool: Pool, first: int, later: Later | None, step: Step, routed: int, routes: StepRoutes) -> int:
        """Run layers from `first` on, `later` being the experts of the one before. Returns the layer whose experts are
        not all at hand, up to its routes; or the number of layers.
        """
        self._descriptor.routed = routed
        reached = c_int32()
        experts = None if later is None else byref(later.call.call)
        end = first, experts, byref(step), byref(reached)
        if routes.reroute is None:
            self._calls.run(pool.address, byref(self._descriptor), *end)
        else:
            held = self._among_held(routes.reroute)
            assert self._held_run is not None
            self._held_run.routed = routed
            self._calls.run_held(pool.address, byref(self._held_run), byref(held.descriptor), *end)
        if later is not None:
            later.computed()
        if routes.reroute is None:
            self._tell(first, reached.value, step.rows, routes.watches)
        else:
            routes.reroute.ran(held.met(first, reached.value, step.rows))
        return reached.value

    def _among_held(self, reroute: Reroute) -> HeldMemory:
        reroute.refresh()
        of = reroute.masks, reroute.shared_by, reroute.tally
        if self._held is None or not self._held.is_of(*of):
            self._held = HeldMemory(self._described, self._moe, self._chosen, *of)
            self._held_run = self._run_over(reroute.places)
        self._held.begin(reroute.limits, reroute.unit, reroute.row_sums)
        return self._held

    def _run_over(self, slots: Sequence[NDArray[np.int64]]) -> Run:
        """As the descriptor, over these tables of slots, by MoE layer."""
        run = Run.from_buffer_copy(self._descriptor)
        tables = (c_void_p * len(self._moe))(*(None if i is None else slots[i].ctypes.data for i in self._moe))
        run.slots = ctypes.addressof(tables)
        self._held_slots = tables, slots
        return run

    def _tell(self, first: int, reached: int, rows: int, watches: Sequence[Watch]) -> None:
        count, stride = rows * self._top_k, FEW_ROWS * self._top_k
        uses = [
            (index, self._chosen[layer * stride : layer * stride + count])
            for layer in range(first, reached)
            if (index := self._moe[layer]) is not None
        ]
        for watch in watches:
            for index, chosen in uses:
                watch.routed(index, np.frombuffer(chosen, np.int64).reshape(rows, -1), None)
        if uses:
            self.source.used_in_passing(uses)


def may_run(routes: StepRoutes, rows: int) -> bool:
    """Whether a step's layers may choose for themselves: nobody has to be asked between, and loads that they may come
    to wait for are decoding tokens'."""
    if any(watch.sees_hidden for watch in routes.watches):
        return False
    if rows > FEW_ROWS:
        return False
    if routes.reroute is not None:
        return routes.routes is None and routes.reroute.runs
    return routes.decodes_alone and not getattr(routes.source, "foresees", True)
