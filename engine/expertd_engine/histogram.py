"""Counting values by upper bound: what `/metrics` shows as histograms. Pure."""

from __future__ import annotations

from bisect import bisect_left

from expertd_engine.snapshot import HistogramData


class Histogram:
    """Counts since start; see `messages.HistogramData`."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """`bounds`: ascending upper bounds, inclusive."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def data(self) -> HistogramData:
        """A copy of what was counted so far."""
        return HistogramData(list(self._bounds), list(self._counts), self._total)
