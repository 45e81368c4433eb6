"""Counters on /metrics never fall, whatever becomes of engines, and every number of a snapshot is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from expertd_engine.snapshot import HistogramData, Shared, Tiers
from expertd_server.engine_families import LINK_CAUSES
from expertd_server.engine_metrics import EngineCounters, add_histograms
from expertd_server.status import tiers
from support.fake_numbers import engine_info, snapshot


def samples(counters: EngineCounters, only: Sequence[str] = ()) -> dict[str, float]:
    """Values by name and labels, of families of the types in `only` or of all."""
    registry = CollectorRegistry()
    registry.register(counters)
    values, kind = {}, ""
    for line in generate_latest(registry).decode().splitlines():
        if line.startswith("# TYPE"):
            kind = line.split()[-1]
        elif not line.startswith("#") and (not only or kind in only):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    return values


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=4))
def test_counters_never_fall_over_any_lives_of_engines(lives: list[list[int]]) -> None:
    counters = EngineCounters()
    before: dict[str, float] = {}
    for life in lives:
        counters.engine_started(engine_info())
        counted = samples(counters, only=("counter", "histogram"))
        steps = 0
        for more in life:
            steps += more
            counters.observe(snapshot(steps))
            now = samples(counters)
            assert all(now[name] >= value for name, value in before.items())
            before = {name: value for name, value in now.items() if name in counted}
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
    assert samples(counters)['expertd_memory_resident_bytes{pool="experts",tier="host"}'] == 0


def test_buckets_are_cumulative_and_end_in_infinity() -> None:
    counters = EngineCounters()
    counters.engine_started(engine_info())
    counters.observe(snapshot(2))
    shown = samples(counters)
    assert shown['expertd_engine_step_seconds_bucket{le="0.001",phase="decode"}'] == 2
    assert (
        shown['expertd_engine_step_seconds_bucket{le="+Inf",phase="decode"}']
        == shown['expertd_engine_step_seconds_count{phase="decode"}']
        == 2
    )


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
    assert shown['expertd_kv_cache_used_bytes{tier="host"}'] == 0
    assert shown['expertd_kv_cache_cached_bytes{tier="host"}'] == 4096
    assert shown['expertd_memory_resident_bytes{pool="kv",tier="host"}'] == 4096


def test_what_a_card_holds_and_what_crossed_its_link_are_shown_and_zeros_without_one() -> None:
    counters = EngineCounters()
    counters.engine_started(engine_info())
    counters.observe(snapshot(3))
    shown = samples(counters)
    assert all(shown[f'expertd_link_bytes_total{{cause="{cause}"}}'] == 0 for cause in LINK_CAUSES)
    crossed = dict(zip(LINK_CAUSES, range(1, 8), strict=True))
    found = Tiers(4096, 8, 5, 2, 65536, True, crossed, 5e10, 1, 6, 7)
    counters.observe(msgspec.structs.replace(snapshot(3), tiers=found))
    shown = samples(counters)
    assert [shown[f'expertd_link_bytes_total{{cause="{cause}"}}'] for cause in LINK_CAUSES] == [1, 2, 3, 4, 5, 6, 7]
    slots = {use: shown[f'expertd_device_slots{{use="{use}"}}'] for use in ("resident", "set_aside", "empty")}
    assert slots == {"resident": 5, "set_aside": 2, "empty": 1}
    assert shown['expertd_tier_bytes{tier="device"}'] == 4096 and shown['expertd_tier_bytes{tier="host"}'] == 65536
    assert shown["expertd_layer_waits_total"] == 7 and shown["expertd_link_duplicates_total"] == 6
    assert shown['expertd_device_misses{by="link"}'] == 1 and shown["expertd_host_computed_experts_total"] == 0
    shared = Shared(True, 4e10, [0.5, 1.0], 3, 4, 1, 0)
    given = {
        "misses": "both", "cpu_bytes_per_s": 9e10, "computed": 8, "computed_bytes": 512, "shared": shared,
        "steps_ahead": 9, "steps_in_vain": 2,
    }  # fmt: skip
    counters.observe(msgspec.structs.replace(snapshot(3), tiers=msgspec.structs.replace(found, **given)))
    shown = samples(counters)
    assert [shown[f'expertd_device_misses{{by="{by}"}}'] for by in ("link", "cpu", "both")] == [0, 0, 1]
    assert (shown["expertd_host_serving_bytes_per_second"], shown["expertd_device_misses_shared"]) == (4e10, 1)
    assert [shown[f"expertd_host_computed_{what}_total"] for what in ("experts", "bytes")] == [8, 512]
    assert shown["expertd_host_bytes_per_second"] == 9e10
    assert [shown[f"expertd_engine_steps_{how}_total"] for how in ("ahead", "in_vain")] == [9, 2]
    body = tiers(found)
    assert body["link"]["bytes"] == crossed and body["device"]["slots"] == 8 and body["link"]["bytes_per_s"] == 5e10
    assert tiers(msgspec.structs.replace(found, link_bytes_per_s=math.inf))["link"]["bytes_per_s"] is None
    alone = {"by": "link", "cpu_bytes_per_s": None, "computed": 0, "computed_bytes": 0, "shared": None}
    assert body["misses"] == alone and body["steps"] == {"ahead": 0, "in_vain": 0}


def test_what_was_being_prefetched_when_an_engine_ended_was_read_in_vain() -> None:
    counters = EngineCounters()
    counters.engine_started(engine_info())
    counters.observe(msgspec.structs.replace(snapshot(3), prefetch_issued=5, prefetch_pending=2))
    assert issued(counters) == known(counters) == 5
    counters.engine_ended()
    assert issued(counters) == known(counters) == 5
    counters.engine_started(engine_info())
    counters.observe(snapshot(1))
    assert issued(counters) == known(counters) == 6


def issued(counters: EngineCounters) -> float:
    return samples(counters)["expertd_expert_prefetch_issued_total"]


def known(counters: EngineCounters) -> float:
    """Prefetches that ended, and those that have not."""
    shown = samples(counters)
    ended = sum(v for k, v in shown.items() if k.startswith("expertd_expert_prefetch_total"))
    return ended + shown["expertd_expert_prefetch_pending"]


def test_lookups_by_result_and_by_foresight_have_one_sum_and_activations_are_pairs() -> None:
    counters = EngineCounters()
    counters.engine_started(engine_info())
    counters.observe(snapshot(3))
    shown = samples(counters)

    def total(name: str) -> float:
        return sum(v for k, v in shown.items() if k.startswith(f"expertd_{name}_total"))

    assert total("expert_lookups") == total("expert_lookahead_experts") == 2 * 6
    assert total("expert_activations") == 2 * 12
    assert total("store_read_bytes") == total("swap_bytes") == 3 * 8192
