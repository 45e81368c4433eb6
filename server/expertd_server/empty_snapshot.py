"""What metrics show of an engine that has done nothing: the zeros of the first scrape."""

from __future__ import annotations

import msgspec

from expertd_engine.snapshot import HistogramData, LayerLookups, Snapshot
from expertd_server.engine_families import PHASES, PREFETCH_OUTCOMES, STALL_CAUSES

NOTHING = HistogramData([], [0], 0.0)
"""A histogram of unknown bounds that counted nothing."""

_ZERO_COUNTS = (
    "demand_loads", "demand_bytes", "prefetch_loads", "prefetch_bytes", "read_bytes", "prefetch_issued",
    "prefetch_used", "prefetch_late", "prefetch_wasted", "prefetch_cancelled", "prefetch_pending", "load_queue",
    "load_failures", "records_swept", "expert_budget_bytes", "expert_limit_bytes", "resident_bytes", "loading_bytes",
    "peak_expert_bytes", "memory_used_bytes", "memory_peak_bytes", "memory_shrinks", "pressure_stalled",
    "pressure_lent_bytes", "pressure_shrinks", "dense_bytes",
    "kv_capacity_bytes", "kv_used_bytes", "kv_cached_bytes", "prefix_cache_queries", "prefix_cache_hits",
    "kv_cache_evictions", "running", "waiting", "preemptions",
    "virtual_tokens",
)  # fmt: skip


def empty_snapshot(layers: int = 0) -> Snapshot:
    """Zeros, of a model of so many MoE layers."""
    counts = dict.fromkeys(_ZERO_COUNTS, 0)
    rest: dict[str, object] = {
        "time_s": 0.0,
        "lookups": [LayerLookups(0, 0, 0, 0, 0, 0, 0)] * layers,
        "prefetch_outcome_bytes": dict.fromkeys(PREFETCH_OUTCOMES, 0),
        "virtual": [],
        "records_bad": [],
        "load_seconds": 0.0,
        "cpu_seconds": 0.0,
        "stall_seconds": dict.fromkeys(STALL_CAUSES, 0.0),
        "step_stall_seconds": dict.fromkeys(STALL_CAUSES, NOTHING),
        "evictions": {"capacity": 0, "budget_change": 0},
        "residents_by_layer": [0] * layers,
        "memory_source": "process",
        "memory_budget_bytes": None,
        "steps": dict.fromkeys(PHASES, 0),
        "step_seconds": dict.fromkeys(PHASES, NOTHING),
        "step_tokens": dict.fromkeys(PHASES, NOTHING),
        "load_latency_seconds": NOTHING,
    }
    return msgspec.convert({"type": "Snapshot", **counts, **rest}, Snapshot)
