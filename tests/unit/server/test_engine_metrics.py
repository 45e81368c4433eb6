"""Counters on /metrics never fall, whatever becomes of engines, and every number of a snapshot is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from expertd_engine.messages import HistogramData
from expertd_server.engine_metrics import EngineCounters, add_histograms
from support.fake_engine import engine_info, snapshot

GAUGE_WORDS = (
    "_age_seconds", "_pending", "_bytes{pool", "memory_", "kv_cache_used_", "kv_cache_cached_", "kv_cache_capacity_",
    "requests_", "experts_resident",
)  # fmt: skip


def samples(counters: EngineCounters) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(counters)
    lines = (line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=4))
def test_counters_never_fall_over_any_lives_of_engines(lives: list[list[int]]) -> None:
    counters = EngineCounters()
    before: dict[str, float] = {}
    for life in lives:
        counters.engine_started(engine_info())
        steps = 0
        for more in life:
            steps += more
            counters.observe(snapshot(steps))
            now = samples(counters)
            assert all(now[name] >= value for name, value in before.items())
            before = {n: v for n, v in now.items() if not any(word in n for word in GAUGE_WORDS)}
        counters.engine_ended()
        now = samples(counters)
        assert all(now[name] == value for name, value in before.items())


def test_gauges_of_an_engine_end_with_it() -> None:
    counters = EngineCounters()
    counters.engine_started(engine_info())
    counters.observe(snapshot(3, waiting=2, running=1))
    assert samples(counters)["expertd_requests_waiting"] == 2
    counters.engine_ended()
    assert samples(counters)["expertd_requests_waiting"] == 0
    assert samples(counters)['expertd_memory_resident_bytes{pool="experts",tier="device"}'] == 0


def test_buckets_are_cumulative_and_end_in_infinity() -> None:
    counters = EngineCounters()
    counters.engine_started(engine_info())
    counters.observe(snapshot(2))
    shown = samples(counters)
    assert shown['expertd_engine_step_seconds_bucket{le="0.001"}'] == 2
    assert shown['expertd_engine_step_seconds_bucket{le="+Inf"}'] == shown["expertd_engine_step_seconds_count"] == 2


def test_histograms_of_different_bounds_are_not_added() -> None:
    with pytest.raises(ValueError, match="bounds"):
        add_histograms(HistogramData([1.0], [1, 0], 1.0), HistogramData([2.0], [1, 0], 1.0))


def test_the_prefix_cache_is_shown_beside_the_kv_in_use() -> None:
    counters = EngineCounters()
    counters.engine_started(engine_info())
    counters.observe(snapshot(3))
    shown = samples(counters)
    assert shown["expertd_prefix_cache_queries_total"] == 30
    assert shown["expertd_prefix_cache_hits_total"] == 12
    assert shown["expertd_kv_cache_evictions_total"] == 3
    assert shown['expertd_kv_cache_used_bytes{tier="device"}'] == 0
    assert shown['expertd_kv_cache_cached_bytes{tier="device"}'] == 4096
    assert shown['expertd_memory_resident_bytes{pool="kv",tier="device"}'] == 4096
