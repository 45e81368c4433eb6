"""What virtual steps have done to their tokens, by MoE layer. Owner: who routes them."""

from __future__ import annotations

from dataclasses import dataclass

from expertd_engine.model.substitution import Met


@dataclass(slots=True)
class VirtualCounts:
    """Since start, by MoE layer."""

    activations: list[int]
    """(token, choice) pairs of virtual steps."""
    substituted: list[int]
    """Of these: answered by another expert than the router's own."""
    mass: list[float]
    """Substituted mass, summed over tokens."""
    tokens: int = 0
    fetched: int = 0
    """Choices whose expert was not held and was waited for, all layers together."""

    @classmethod
    def of(cls, layers: int) -> VirtualCounts:
        return cls([0] * layers, [0] * layers, [0.0] * layers)

    def add(self, met: Met) -> None:
        """Of layers that native code has run."""
        _, rows, top_k = met.chosen.shape
        numbers = zip(met.layers, met.replaced.sum(axis=1).tolist(), met.mass.sum(axis=1).tolist(), strict=True)
        for layer, replaced, mass in numbers:
            self.activations[layer] += rows * top_k
            self.substituted[layer] += replaced
            self.mass[layer] += mass
