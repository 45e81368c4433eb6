"""What native code reads and leaves where rows go to held experts: memory for a run of layers, or for one layer."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from ctypes import addressof, byref

import numpy as np
from torch import Tensor

from expertd_engine.kernels.library import Pool
from expertd_engine.model.moe import FEW_ROWS
from expertd_engine.model.native_abi import Block, HeldRun, Router, Substitution
from expertd_engine.model.substitution import Bools, Floats, Ids, Int32s, Met, Substituted


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
    ) -> None:
        count, top_k = len(blocks), max(block.router.top_k for block in blocks)
        self._moe, self._top_k = moe, top_k
        self._masks = masks
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
        self.descriptor = HeldRun(
            addressof(self._layers), self._weights.ctypes.data, self._lengths.ctypes.data, FEW_ROWS
        )

    def is_of(self, masks: Sequence[Bools], shared_by: int) -> bool:
        return self._masks is masks and self._layers[0].shared_by == shared_by

    def begin(self, limits: Floats) -> None:
        """A run of rows with these limits `[T]` follows."""
        self._limits[: len(limits)] = limits

    def met(self, first: int, stop: int, rows: int) -> Met:
        """What the layers from `first` to before `stop` did with so many rows."""
        routed = [layer for layer in range(first, stop) if self._moe[layer] is not None]
        layers = [index for layer in routed if (index := self._moe[layer]) is not None]
        at = slice(first, stop) if len(layers) == stop - first else routed  # a slice copies nothing
        shape, wider = (len(layers), rows, self._top_k), (len(layers), rows, 2 * self._top_k)
        return Met(
            layers,
            self._chosen[at, : rows * self._top_k].reshape(shape),
            self._weights[at, : rows * self._top_k].reshape(shape),
            self._lengths[at, :rows],
            self._served[at, : 2 * rows * self._top_k].reshape(wider),
            self._counts[at, :rows],
            self._replaced[at, :rows],
            self._mass[at, :rows],
        )

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
