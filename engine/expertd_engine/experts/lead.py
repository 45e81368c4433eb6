"""How long before a step's end the host begins with the next one: just so long that it has launched it by then. Pure.

Whoever begins later lets the device stand still; whoever begins earlier knows less of what the next step should find.
How long the host needs differs from box to box and from step to step, so it is found out by doing.
"""

from __future__ import annotations

FIRST = 8
"""The first guess: the last of so many parts of a step's layers."""
CALM = 64
"""Launches in time, one after the other, after which one layer less is tried."""


class Lead:
    """In MoE layers of a step of `layers`; told of every launch."""

    def __init__(self, layers: int) -> None:
        self.layers = -(-layers // FIRST)
        self._most = layers
        self._calm = 0

    def launched(self, *, late: bool) -> None:
        """A launch was given to the device; `late`: after the end of the one before."""
        self._calm = 0 if late else self._calm + 1
        if late:
            self.layers = min(self._most, self.layers + 1)
        elif self._calm >= CALM:
            self._calm, self.layers = 0, max(1, self.layers - 1)
