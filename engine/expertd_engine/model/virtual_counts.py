"""What virtual steps have done to their tokens, by MoE layer, and the memory that native runs add to. Owner: who routes
them.
"""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass

import numpy as np

from expertd_engine.model.substitution import Floats, Ids, Int32s


@dataclass(slots=True)
class VirtualCounts:
    """Since start, by MoE layer."""

    activations: MutableSequence[int]
    """(token, choice) pairs of virtual steps."""
    substituted: MutableSequence[int]
    """Of these: answered by another expert than the router's own."""
    mass: MutableSequence[float]
    """Substituted mass, summed over tokens."""
    tokens: int = 0
    fetched: int = 0
    """Choices whose expert was not held and was waited for, all layers together."""

    @classmethod
    def of(cls, layers: int) -> VirtualCounts:
        return cls(array("q", bytes(8 * layers)), array("q", bytes(8 * layers)), array("d", bytes(8 * layers)))


class RowSums:
    """What a step did to each of its rows, over all layers."""

    def __init__(self, rows: int) -> None:
        self.substituted, self.mass = array("q", bytes(8 * rows)), array("d", bytes(8 * rows))
        self.addresses = self.substituted.buffer_info()[0], self.mass.buffer_info()[0]

    def add(self, substituted: Ids | Int32s, mass: Floats) -> None:
        """What one layer did, `[T]` both."""
        counted, summed = np.frombuffer(self.substituted, np.int64), np.frombuffer(self.mass)
        counted += substituted
        summed += mass


class Tally:
    """What native runs add to as they pass each MoE layer: arrays that stay where they are."""

    def __init__(self, layers: int, norms: Sequence[Floats] | None, scores: array[float], width: int) -> None:
        """`norms`: what choices count for beside ‖x‖·g, `[E]` by layer; None: who routes sums up scores. `scores`
        `[L, width]` are added to in the sets' own unit."""
        self.activations, self.substituted = array("q", bytes(8 * layers)), array("q", bytes(8 * layers))
        self.mass = array("d", bytes(8 * layers))
        self.norms = norms
        self._scores = scores
        self._width = width

    def counts(self) -> VirtualCounts:
        """Over the same memory."""
        return VirtualCounts(self.activations, self.substituted, self.mass)

    def addresses(self, layer: int) -> tuple[int | None, ...]:
        """Of norms, scores and the three counts of a layer, as `LayerTally` has them."""
        counts = (self.activations, self.substituted, self.mass)
        if self.norms is None:
            summed: tuple[int | None, ...] = (None, None)
        else:
            summed = self.norms[layer].ctypes.data, _at(self._scores, layer * self._width)
        return *summed, *(_at(one, layer) for one in counts)


def _at(numbers: array[int] | array[float], index: int) -> int:
    return numbers.buffer_info()[0] + index * numbers.itemsize
