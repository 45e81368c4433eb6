"""What native code reads and leaves where rows go to held experts: memory for a run of layers, or for one layer."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from ctypes import addressof, byref
from functools import partial

import numpy as np
from torch import Tensor

from expertd_engine.kernels.library import Pool
from expertd_engine.model.moe import FEW_ROWS
from expertd_engine.model.native_abi import Block, HeldRun, LayerTally, Router, Substitution
from expertd_engine.model.substitution import Asked, Bools, Floats, Ids, Int32s, Met, Substituted
from expertd_engine.model.virtual_counts import RowSums, Tally


class HeldMemory:
    """Of runs of up to `FEW_ROWS` rows; `moe[l]` is the MoE layer that decoder layer l is, or None.

    `chosen` is the run's own memory, `[layers, FEW_ROWS * top_k]`; `masks[m]` says who MoE layer m holds.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        moe: Sequence[int | None],
        chosen: array[int],
        masks: Sequence[Bools],
        shared_by: int,
        tally: Tally,
    ) -> None:
        count, top_k = len(blocks), max(block.router.top_k for block in blocks)
        self._moe, self._top_k = moe, top_k
        self._masks = masks
        self._tally = tally
        self._chosen = np.frombuffer(chosen, np.int64).reshape(count, -1)
        self._weights = np.zeros((count, FEW_ROWS * top_k), np.float32)
        self._lengths = np.zeros((count, FEW_ROWS), np.float32)
        self._served = np.zeros((count, 2 * FEW_ROWS * top_k), np.int64)
        self._shares = np.zeros((count, 2 * FEW_ROWS * top_k), np.float32)
        self._counts, self._replaced = np.zeros((2, count, FEW_ROWS), np.int32)
        self._mass = np.zeros((count, FEW_ROWS), np.float32)
        self._limits = np.zeros(FEW_ROWS, np.float32)
        self._layers = (Substitution * count)(
            *(
                Substitution(
                    *(None if index is None else masks[index].ctypes.data, self._limits.ctypes.data, shared_by),
                    *(results[layer].ctypes.data for results in self._results()),
                )
                for layer, index in enumerate(moe)
            )
        )
        self._tallies = (LayerTally * count)(
            *(LayerTally() if index is None else LayerTally(*tally.addresses(index)) for index in moe)
        )
        self._computed = np.zeros((count, 2), np.int64)
        self._routed: tuple[int, int, list[int], list[int]] = 0, 0, [], []
        self.descriptor = HeldRun(
            *(addressof(self._layers), addressof(self._tallies), 1.0),
            *(self._weights.ctypes.data, self._lengths.ctypes.data, FEW_ROWS),
            *(self._computed.ctypes.data, None, None),
        )

    def is_of(self, masks: Sequence[Bools], shared_by: int, tally: Tally) -> bool:
        return self._masks is masks and self._layers[0].shared_by == shared_by and self._tally is tally

    def begin(self, limits: Floats, unit: float, rows: RowSums) -> None:
        """A run of rows with these limits `[T]` follows, which adds to `rows`; what is observed counts for `unit`."""
        self._limits[: len(limits)] = limits
        self.descriptor.unit = unit
        self.descriptor.row_replaced, self.descriptor.row_mass = rows.addresses

    def met(self, first: int, stop: int, rows: int) -> Met:
        """What the layers from `first` to before `stop` did with so many rows."""
        if self._routed[:2] != (first, stop):
            self._routed = first, stop, *self._between(first, stop)
        layers, routed = self._routed[2:]
        at = slice(first, stop) if len(layers) == stop - first else routed  # a slice copies nothing
        return Met(layers, self._top_k, self._computed[at].tolist(), partial(self._asked, at, len(layers), rows))

    def _asked(self, at: slice | list[int], layers: int, rows: int) -> Asked:
        shape = layers, rows, self._top_k
        return Asked(
            self._chosen[at, : rows * self._top_k].reshape(shape),
            self._weights[at, : rows * self._top_k].reshape(shape),
            self._lengths[at, :rows],
        )

    def _between(self, first: int, stop: int) -> tuple[list[int], list[int]]:
        """MoE layers, and the decoder layers that they are."""
        routed = [layer for layer in range(first, stop) if self._moe[layer] is not None]
        return [index for layer in routed if (index := self._moe[layer]) is not None], routed

    def _results(self) -> tuple[Ids | Floats | Int32s, ...]:
        return self._served, self._shares, self._counts, self._replaced, self._mass


class NativeSubstitution:
    """One layer's rows among held experts, by the very code that runs of layers use."""

    def __init__(self, call: Callable[..., None], pool: Pool, router: Router) -> None:
        self._call = call
        self._pool = pool
        self._router = router

    def __call__(
        self, logits: Tensor, chosen: Ids, weights: Floats, held: Bools, limits: Floats, shared_by: int
    ) -> Substituted:
        """`logits` `[T, E]`, the router's own `chosen` and `weights` `[T, K]`, `held` `[E]`, `limits` `[T]`."""
        rows, top_k = chosen.shape
        index, gates = np.empty((rows, 2 * top_k), np.int64), np.empty((rows, 2 * top_k), np.float32)
        counts, replaced = np.empty(rows, np.int32), np.empty(rows, np.int32)
        mass = np.empty(rows, np.float32)
        results = (index, gates, counts, replaced, mass)
        substitution = Substitution(
            held.ctypes.data, limits.ctypes.data, shared_by, *(result.ctypes.data for result in results)
        )
        self._call(
            *(self._pool.address, byref(self._router), byref(substitution), rows),
            *(logits.data_ptr(), chosen.ctypes.data, weights.ctypes.data),
        )
        width = max(top_k, int(counts.max()))
        return Substituted(index[:, :width], gates[:, :width], replaced, mass)


assert ctypes.sizeof(ctypes.c_bool) == 1  # a mask of numpy's bools is what native code reads
