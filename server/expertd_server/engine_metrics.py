"""The engine's numbers as Prometheus families. Owner of the latest snapshot and of what earlier engines had counted.

The engine counts from zero each time it starts. `EngineCounters` remembers what earlier engine processes reached and
adds it, so that no counter on /metrics ever falls, and what holds between counters still does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from expertd_engine.messages import EngineInfo
from expertd_engine.snapshot import HistogramData, Snapshot
from expertd_server.empty_snapshot import NOTHING, empty_snapshot
from expertd_server.engine_families import (
    COUNTERS,
    DISK,
    GAUGES,
    HISTOGRAMS,
    HOST,
    UP,
    Family,
    HistogramFamily,
    Labels,
)


def add_histograms(a: HistogramData, b: HistogramData) -> HistogramData:
    """The sum of two histograms of equal bounds; one without bounds is nothing. Raises ValueError otherwise."""
    if not a.bounds or not b.bounds:
        return b if b.bounds else a
    if a.bounds != b.bounds:
        raise ValueError("histograms of different bounds cannot be added")
    return HistogramData(a.bounds, [x + y for x, y in zip(a.counts, b.counts, strict=True)], a.total + b.total)


class EngineCounters(Collector):
    """Collects what one engine process after the other has counted."""

    def __init__(self) -> None:
        self.snapshot = empty_snapshot()
        """The latest."""
        self._snapshot_s: float | None = None
        self._info: EngineInfo | None = None
        self._counter_base: dict[tuple[str, Labels], float] = {}
        self._histogram_base: dict[tuple[str, Labels], HistogramData] = {}

    def engine_started(self, info: EngineInfo) -> None:
        """A new engine process serves: it begins at zero, with a series for each layer."""
        self.snapshot = empty_snapshot(info.num_moe_layers)
        self._info = info

    def observe(self, snapshot: Snapshot) -> None:
        """The engine has sent its numbers."""
        self.snapshot = snapshot
        self._snapshot_s = time.monotonic()

    def engine_ended(self) -> None:
        """Keep what the engine had counted; its gauges are over, and what it was prefetching was read in vain."""
        wasted = ("expert_prefetch", (*UP, "wasted"))
        self._counter_base, lost = self.totals(), self.snapshot.prefetch_pending
        self._counter_base[wasted] += lost
        self._histogram_base = {
            (family.name, labels): data for family in HISTOGRAMS for labels, data in self._histograms(family)
        }
        self.snapshot = empty_snapshot(len(self.snapshot.lookups))
        self._snapshot_s = None

    def snapshot_age_s(self) -> float:
        """Seconds since the engine's last snapshot; infinite before the first."""
        return time.monotonic() - self._snapshot_s if self._snapshot_s is not None else float("inf")

    def totals(self) -> dict[tuple[str, Labels], float]:
        """Every counter by family and labels, over all engines so far."""
        total = dict(self._counter_base)
        for family in COUNTERS:
            for labels, value in family.read(self.snapshot):
                total[family.name, labels] = total.get((family.name, labels), 0) + value
        return total

    def _histograms(self, family: HistogramFamily) -> Iterator[tuple[Labels, HistogramData]]:
        for labels, data in family.read(self.snapshot):
            yield labels, add_histograms(self._histogram_base.get((family.name, labels), NOTHING), data)

    def collect(self) -> Iterator[Metric]:
        """All families, as a scrape shows them."""
        counters = {family.name: self._counter(family) for family in COUNTERS}
        for (name, labels), value in self.totals().items():
            counters[name].add_metric(labels, value)
        yield from counters.values()
        for family in GAUGES:
            gauge = _gauge(family.name, family.help, family.labels)
            for labels, value in family.read(self.snapshot):
                gauge.add_metric(labels, value)
            yield gauge
        yield from map(self._render_histogram, HISTOGRAMS)
        yield from self._render_info()

    @staticmethod
    def _counter(family: Family) -> CounterMetricFamily:
        return CounterMetricFamily("expertd_" + family.name, family.help, labels=family.labels)

    def _render_histogram(self, family: HistogramFamily) -> Metric:
        metric = HistogramMetricFamily("expertd_" + family.name, family.help, labels=family.labels)
        for labels, data in self._histograms(family):
            buckets, below = [], 0
            for bound, count in zip([*map(str, data.bounds), "+Inf"], data.counts, strict=True):
                below += count
                buckets.append((bound, float(below)))
            metric.add_metric(labels, buckets, data.total)
        return metric

    def _render_info(self) -> Iterator[Metric]:
        """What does not change while an engine lives, and how old its numbers are."""
        if self._info is not None:
            tiers = _gauge(
                "expert_bytes", "Bytes of all experts in a tier: in slots (host), in the store (disk).", ("tier",)
            )
            tiers.add_metric((HOST,), self.snapshot.resident_bytes)
            tiers.add_metric((DISK,), self._info.expert_bytes_total)
            yield tiers
        if self._info is not None and (memory_budget := memory_budget_of(self._info, self.snapshot)) is not None:
            total = _gauge("total_memory_budget_bytes", "The memory budget of server, engine and children together.")
            total.add_metric((), memory_budget)
            yield total
        age = _gauge("metrics_snapshot_age_seconds", "Age of the engine's numbers here.")
        age.add_metric((), self.snapshot_age_s())
        yield age


def memory_budget_of(info: EngineInfo, snapshot: Snapshot) -> int | None:
    """The one in force: the latest told of, or what the engine began with. It may change, but not go."""
    return snapshot.memory_budget_bytes or info.memory_budget_bytes


def _gauge(name: str, text: str, labels: Labels = ()) -> GaugeMetricFamily:
    return GaugeMetricFamily("expertd_" + name, text, labels=labels)
