"""How much of an expert budget virtual mode may hold, and how many slots that gives each layer. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class VirtualRoom:
    """How much of an expert budget held experts may take.

    By MoE layer: `record_bytes`, `experts` (how many there are) and `wanted`, the slots of a plan, in whose proportion
    room is given. `share` of the budget is theirs; exact steps load into the rest, and swaps pass through it.
    """

    record_bytes: Sequence[int]
    experts: Sequence[int]
    top_k: int
    share: float
    wanted: Sequence[int]
    divide: Callable[[int], list[int]] | None = None
    """Solves for the slots in so many bytes, where the model was profiled."""

    @property
    def minimum_bytes(self) -> int:
        """The least expert budget for virtual mode: what a token needs in each layer, and two slots to load through."""
        return self._bytes([self.top_k] * len(self.experts)) + 2 * max(self.record_bytes)

    def slots(self, budget_bytes: int) -> list[int] | None:
        """Slots of each layer in such a budget; None where it is too small."""
        if budget_bytes >= self._bytes(self.experts):
            return self._scaled(1.0)
        if budget_bytes < self.minimum_bytes:
            return None
        room = min(int(self.share * budget_bytes), budget_bytes - 2 * max(self.record_bytes))
        if self.divide is not None:
            return self.divide(max(room, self._bytes([self.top_k] * len(self.experts))))
        low, high = 0.0, 1.0
        if self._bytes(self._scaled(high)) <= room:
            return self._scaled(high)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._bytes(self._scaled(middle)) <= room else (low, middle)
        return self._scaled(low)

    def _scaled(self, factor: float) -> list[int]:
        pairs = zip(self.wanted, self.experts, strict=True)
        return [min(max(int(factor * wanted), self.top_k), experts) for wanted, experts in pairs]

    def _bytes(self, slots: Sequence[int]) -> int:
        return sum(count * nbytes for count, nbytes in zip(slots, self.record_bytes, strict=True))
