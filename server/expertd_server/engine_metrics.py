"""The engine's counters as Prometheus families. Pure but for `EngineCounters`, which keeps the latest snapshot.

The engine counts from zero each time it starts. `EngineCounters` remembers what earlier engine processes reached and
adds it, so that no counter on /metrics ever falls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from expertd_engine.messages import EngineInfo, HistogramData, LayerLookups, Snapshot

Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float]]

DEVICE, DISK = "device", "disk"
UP = (DISK, DEVICE)
"""The way of a load: from tier, to tier."""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric read off a snapshot: counter samples are cumulative since the engine process started."""

    name: str
    help: str
    labels: Labels
    read: Callable[[Snapshot], Samples]


def _lookups(s: Snapshot) -> Iterator[tuple[Labels, float]]:
    for i, layer in enumerate(s.lookups):
        yield (str(i), DEVICE, "hit"), layer.hit
        yield (str(i), DISK, "late"), layer.late
        yield (str(i), DISK, "miss"), layer.miss


def _prefetches(s: Snapshot) -> Samples:
    outcomes = {
        "used": s.prefetch_used, "late": s.prefetch_late, "wasted": s.prefetch_wasted,
        "cancelled": s.prefetch_cancelled,
    }  # fmt: skip
    return [((*UP, outcome), count) for outcome, count in outcomes.items()]


COUNTERS = (
    Family("expert_lookups", "Lookups, one per distinct (step, layer, expert), by the tier where the expert was found.",
           ("layer", "tier", "result"), _lookups),
    Family("expert_activations", "Pairs of (token, choice) routed.", ("layer",),
           lambda s: [((str(i),), layer.activations) for i, layer in enumerate(s.lookups)]),
    Family("expert_prefetch", "Prefetches by what became of them.", ("tier_from", "tier_to", "outcome"), _prefetches),
    Family("expert_evictions", "Experts that gave way, by reason.", ("tier", "reason"),
           lambda s: [((DEVICE, reason), count) for reason, count in s.evictions.items()]),
    Family("expert_load_failures", "Loads that ended without their bytes.", (),
           lambda s: [((), s.load_failures)]),
    Family("swap_transfers", "Records moved, by kind.", ("from_tier", "to_tier", "kind"),
           lambda s: [((*UP, "demand"), s.demand_loads), ((*UP, "prefetch"), s.prefetch_loads)]),
    Family("swap_bytes", "Bytes moved, by kind.", ("from_tier", "to_tier", "kind"),
           lambda s: [((*UP, "demand"), s.demand_bytes), ((*UP, "prefetch"), s.prefetch_bytes)]),
    Family("swap_seconds", "Busy time of the transfer threads, summed over threads.", ("from_tier", "to_tier"),
           lambda s: [(UP, s.load_seconds)]),
    Family("stall_seconds", "Time in which compute stood still because data was missing.", ("cause",),
           lambda s: [((cause,), seconds) for cause, seconds in s.stall_seconds.items()]),
    Family("engine_steps", "Forward passes; prefill: with any prompt token in it.", ("phase",),
           lambda s: [((phase,), count) for phase, count in s.steps.items()]),
    Family("preemptions", "Sequences that gave their KV blocks back and start over.", (),
           lambda s: [((), s.preemptions)]),
    Family("memory_shrinks", "Times memory was above its budget and the expert budget was lowered by the excess.", (),
           lambda s: [((), s.memory_shrinks)]),
    Family("prefix_cache_queries", "Tokens of admitted sequences that were looked up among cached KV blocks.", (),
           lambda s: [((), s.prefix_cache_queries)]),
    Family("prefix_cache_hits", "Tokens found in cached KV blocks and so not computed.", (),
           lambda s: [((), s.prefix_cache_hits)]),
    Family("kv_cache_evictions", "Cached KV blocks given up for room.", (), lambda s: [((), s.kv_cache_evictions)]),
)  # fmt: skip

GAUGES = (
    Family("expert_prefetch_pending", "Prefetches issued whose outcome is not known yet.", (),
           lambda s: [((), s.prefetch_pending)]),
    Family("memory_budget_bytes", "The budget of a pool.", ("pool", "tier"),
           lambda s: [(("experts", DEVICE), s.expert_budget_bytes)]),
    Family("memory_limit_bytes", "The limit in force: above the budget only while a lowered one waits for leases.",
           ("pool", "tier"), lambda s: [(("experts", DEVICE), s.expert_limit_bytes)]),
    Family("memory_resident_bytes", "Bytes that hold finished data.", ("pool", "tier"),
           lambda s: [(("experts", DEVICE), s.resident_bytes), (("dense", DEVICE), s.dense_bytes),
                      (("kv", DEVICE), s.kv_used_bytes + s.kv_cached_bytes)]),
    Family("memory_reserved_bytes", "Bytes taken by what is not there yet: loads in flight, doomed ones included.",
           ("pool", "tier"), lambda s: [(("experts", DEVICE), s.loading_bytes)]),
    Family("memory_peak_bytes", "Largest sum of resident and reserved bytes since the engine started.",
           ("pool", "tier"), lambda s: [(("experts", DEVICE), s.peak_expert_bytes)]),
    Family("memory_used_bytes", "Memory in use as the kernel counts it.", ("source",),
           lambda s: [((s.memory_source,), s.memory_used_bytes)]),
    Family("memory_used_peak_bytes", "Largest memory in use as the kernel counts it.", ("source",),
           lambda s: [((s.memory_source,), s.memory_peak_bytes)]),
    Family("experts_resident", "Experts in slots.", ("layer", "tier"),
           lambda s: [((str(i), DEVICE), count) for i, count in enumerate(s.residents_by_layer)]),
    Family("kv_cache_used_bytes", "Bytes of KV blocks that sequences hold.", ("tier",),
           lambda s: [((DEVICE,), s.kv_used_bytes)]),
    Family("kv_cache_cached_bytes", "Bytes of KV blocks that no sequence holds, kept for prompts that begin alike.",
           ("tier",), lambda s: [((DEVICE,), s.kv_cached_bytes)]),
    Family("kv_cache_capacity_bytes", "Bytes of all KV blocks.", ("tier",),
           lambda s: [((DEVICE,), s.kv_capacity_bytes)]),
    Family("requests_running", "Sequences being computed.", (), lambda s: [((), s.running)]),
    Family("requests_waiting", "Sequences waiting in the engine.", (), lambda s: [((), s.waiting)]),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HistogramFamily:
    name: str
    help: str
    labels: dict[str, str]
    read: Callable[[Snapshot], HistogramData]


HISTOGRAMS = (
    HistogramFamily("engine_step_seconds", "Duration of a step.", {}, lambda s: s.step_seconds),
    HistogramFamily("engine_step_tokens", "Tokens in a step.", {}, lambda s: s.step_tokens),
    HistogramFamily("swap_transfer_seconds", "Duration of one load, from when it began.",
                    {"from_tier": DISK, "to_tier": DEVICE}, lambda s: s.load_latency_seconds),
)  # fmt: skip


def empty_snapshot(layers: int = 0) -> Snapshot:
    """A snapshot of an engine that has done nothing: the zeros of the first scrape."""
    nothing = HistogramData([], [0], 0.0)
    counts = dict.fromkeys(
        ("demand_loads", "demand_bytes", "prefetch_loads", "prefetch_bytes", "prefetch_used", "prefetch_late",
         "prefetch_wasted", "prefetch_cancelled", "prefetch_pending", "load_failures", "expert_budget_bytes",
         "expert_limit_bytes", "resident_bytes", "loading_bytes", "peak_expert_bytes", "memory_used_bytes",
         "memory_peak_bytes", "memory_shrinks", "dense_bytes", "kv_capacity_bytes", "kv_used_bytes", "kv_cached_bytes",
         "prefix_cache_queries", "prefix_cache_hits", "kv_cache_evictions", "running", "waiting",
         "preemptions"), 0)  # fmt: skip
    return Snapshot(
        time_s=0.0, lookups=[LayerLookups(0, 0, 0, 0)] * layers, load_seconds=0.0, stall_seconds={"expert_wait": 0.0},
        evictions={"capacity": 0, "budget_change": 0}, residents_by_layer=[0] * layers, memory_source="process",
        steps={"prefill": 0, "decode": 0}, step_seconds=nothing, step_tokens=nothing, load_latency_seconds=nothing,
        **counts,
    )  # fmt: skip


def add_histograms(a: HistogramData, b: HistogramData) -> HistogramData:
    """The sum of two histograms of equal bounds; one without bounds is nothing. Raises ValueError otherwise."""
    if not a.bounds or not b.bounds:
        return b if b.bounds else a
    if a.bounds != b.bounds:
        raise ValueError("histograms of different bounds cannot be added")
    return HistogramData(a.bounds, [x + y for x, y in zip(a.counts, b.counts, strict=True)], a.total + b.total)


class EngineCounters(Collector):
    """Owner of the latest snapshot and of the offsets left by earlier engine processes."""

    def __init__(self) -> None:
        self._snapshot = empty_snapshot()
        self._snapshot_s: float | None = None
        self._memory_budget_bytes: int | None = None
        self._counter_base: dict[tuple[str, Labels], float] = {}
        self._histogram_base: dict[str, HistogramData] = {}

    def engine_started(self, info: EngineInfo) -> None:
        """A new engine process serves: it begins at zero, with a series for each layer."""
        self._snapshot = empty_snapshot(info.num_moe_layers)
        self._memory_budget_bytes = info.memory_budget_bytes

    def observe(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._snapshot_s = time.monotonic()

    def engine_ended(self) -> None:
        """Keep what the engine had counted; its gauges are over."""
        self._counter_base = self._counters()
        self._histogram_base = {h.name: self._histogram(h) for h in HISTOGRAMS}
        self._snapshot = empty_snapshot(len(self._snapshot.lookups))
        self._snapshot_s = None

    def snapshot_age_s(self) -> float:
        """Seconds since the engine's last snapshot; infinite before the first."""
        return time.monotonic() - self._snapshot_s if self._snapshot_s is not None else float("inf")

    def _counters(self) -> dict[tuple[str, Labels], float]:
        total = dict(self._counter_base)
        for family in COUNTERS:
            for labels, value in family.read(self._snapshot):
                total[family.name, labels] = total.get((family.name, labels), 0) + value
        return total

    def _histogram(self, family: HistogramFamily) -> HistogramData:
        current = family.read(self._snapshot)
        return add_histograms(self._histogram_base.get(family.name, current.__class__([], [0], 0.0)), current)

    def collect(self) -> Iterator[Metric]:
        counters = self._counters()
        for family in COUNTERS:
            counter = CounterMetricFamily("expertd_" + family.name, family.help, labels=family.labels)
            for (name, labels), value in counters.items():
                if name == family.name:
                    counter.add_metric(labels, value)
            yield counter
        for family in GAUGES:
            gauge = GaugeMetricFamily("expertd_" + family.name, family.help, labels=family.labels)
            for labels, value in family.read(self._snapshot):
                gauge.add_metric(labels, value)
            yield gauge
        yield from map(self._render_histogram, HISTOGRAMS)
        if self._memory_budget_bytes is not None:
            yield GaugeMetricFamily(
                "expertd_total_memory_budget_bytes", "The memory budget of server, engine and children together.",
                value=self._memory_budget_bytes)  # fmt: skip
        yield GaugeMetricFamily(
            "expertd_metrics_snapshot_age_seconds", "Age of the engine's numbers here.", value=self.snapshot_age_s()
        )

    def _render_histogram(self, family: HistogramFamily) -> Metric:
        data, below = self._histogram(family), 0
        buckets = []
        for bound, count in zip([*map(str, data.bounds), "+Inf"], data.counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        metric = HistogramMetricFamily("expertd_" + family.name, family.help, labels=list(family.labels))
        metric.add_metric(list(family.labels.values()), buckets, data.total)
        return metric
