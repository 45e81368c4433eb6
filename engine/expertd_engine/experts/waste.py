"""How sure a hint must be to be followed: the surer, the more of what was read ahead of late came to nothing. Pure.

Precision counts how often hints come true, not what became of the reads: those of true ones may come too late to be
begun, or be given up for room. So the ledger's own account of prefetches sets the bar.
"""

from __future__ import annotations

MIN_PRECISION = 0.8
"""A class of hints is followed while, by all odds, at least this share of it comes true."""
_TOLERATED = 0.15
"""Of reads ahead, wasted: above it the bar rises, and is out of reach where a good fifth is wasted."""
_SLOPE = 3.0
_PRIOR = 8.0
"""Made-up reads that came to some use: the first few real ones settle nothing."""
_MEMORY = 256.0
"""Reads after which the account is halved."""
_STEPS = 256
"""After which it is halved too: so what stopped all reads is tried again, by little."""


class WasteLimit:
    """Told now and then what the ledger has counted; `least_precision` is the bar that classes of hints must clear."""

    def __init__(self) -> None:
        self.least_precision = MIN_PRECISION
        self._before = (0, 0)
        self._reads = self._wasted = 0.0

    def tell(self, steps: int, reads: int, wasted: int) -> None:
        """So many `steps` after the last call: since start so many prefetches were read and have come to their end, of
        which some were `wasted`.
        """
        age = 0.5 ** (steps / _STEPS) * (0.5 if self._reads > _MEMORY else 1.0)
        self._reads = age * self._reads + reads - self._before[0]
        self._wasted = age * self._wasted + wasted - self._before[1]
        self._before = (reads, wasted)
        excess = max(0.0, self._wasted / (self._reads + _PRIOR) - _TOLERATED)
        self.least_precision = MIN_PRECISION + _SLOPE * excess
