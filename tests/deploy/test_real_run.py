"""A real Prometheus scrapes a real daemon under load: panels have data, and what must add up does."""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Iterator
from typing import NamedTuple

import httpx
import pytest

from support import prometheus as p
from support.daemon import RunningDaemon, daemon
from support.demo import CACHE, demo_store
from support.load import load

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

SECONDS = 45.0
FLAGS = ("--expert-budget", "25%", "--memory-budget", "1300MiB", "--max-model-len", "1024", "--cache-dir", str(CACHE))

IDENTITIES = {
    "prefetches": "expertd_expert_prefetch_issued_total - on () sum(expertd_expert_prefetch_total)"
    " - on () expertd_expert_prefetch_pending",
    "bytes read": "sum(expertd_swap_bytes_total) - on () expertd_store_read_bytes_total",
    "lookups": "sum(expertd_expert_lookups_total) - sum(expertd_expert_lookahead_experts_total)",
    "residents": 'sum(expertd_memory_resident_bytes{pool="experts"}) - sum(expertd_expert_bytes{tier="host"})',
}
"""Each is zero at every scrape."""

NEVER_TRUE = {
    "experts are inside their limit": 'sum(expertd_memory_resident_bytes{pool="experts"})'
    " + sum(expertd_memory_reserved_bytes) > sum(expertd_memory_limit_bytes)",
    "memory is inside its budget": "sum(expertd_memory_used_bytes) > sum(expertd_total_memory_budget_bytes)",
    "activations are at least lookups": "sum(expertd_expert_activations_total) < sum(expertd_expert_lookups_total)",
}  # fmt: skip


class Run(NamedTuple):
    prometheus: p.Prometheus
    daemon: RunningDaemon
    began: float
    ended: float
    scrape_s: list[float]
    """How long /metrics took under load."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    demo_store("bf16")
    folder = tmp_path_factory.mktemp("prometheus")
    with daemon("demo", *FLAGS) as running:
        target = running.url.removeprefix("http://")
        with p.prometheus(folder, p.scraping(target)) as prometheus:
            began = time.time()
            with load(running.url):
                scrape_s = _time_scrapes(running.url)
            time.sleep(2)  # a last scrape
            yield Run(prometheus, running, began, time.time(), scrape_s)


def _time_scrapes(url: str) -> list[float]:
    taken = []
    with httpx.Client(base_url=url) as http:
        end_s = time.monotonic() + SECONDS
        while time.monotonic() < end_s:
            began_s = time.monotonic()
            assert http.get("/metrics").status_code == 200
            taken.append(time.monotonic() - began_s)
            time.sleep(0.5)
    return taken


def test_every_query_of_every_panel_returns_data(run: Run) -> None:
    for panel, query in p.queries():
        values = [value for _, value in run.prometheus.query(query, at=run.ended - 3)]
        assert [value for value in values if not math.isnan(value)], f"{panel}: {query}"


@pytest.mark.parametrize("name", IDENTITIES)
def test_what_must_add_up_does_at_every_scrape(run: Run, name: str) -> None:
    series = run.prometheus.over_time(IDENTITIES[name], run.began + 3, run.ended)
    assert len(series) == 1
    values = next(iter(series.values()))
    assert len(values) > SECONDS / 2
    assert set(values) == {0.0}, values


@pytest.mark.parametrize("name", NEVER_TRUE)
def test_budgets_hold_at_every_scrape(run: Run, name: str) -> None:
    assert run.prometheus.over_time(NEVER_TRUE[name], run.began, run.ended) == {}


def test_no_counter_fell_and_every_scrape_came(run: Run) -> None:
    seconds = int(run.ended - run.began)
    assert run.prometheus.query(f'min_over_time(up{{job="expertd"}}[{seconds - 3}s])', at=run.ended)[0][1] == 1
    names = run.prometheus.http.get("/api/v1/label/__name__/values").json()["data"]
    counters = [name for name in names if re.fullmatch("expertd_.*_(total|count|bucket)", name)]
    assert len(counters) > 50
    fallen = [name for name in counters if run.prometheus.query(f"resets({name}[{seconds}s]) > 0", at=run.ended)]
    assert not fallen


def test_promtool_finds_nothing_to_say(run: Run) -> None:
    text = run.daemon.http.get("/metrics").text
    done = subprocess.run([p.tool("promtool"), "check", "metrics"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_no_alert_fires_but_those_that_should(run: Run) -> None:
    firing = {labels["alertname"] for labels, _ in run.prometheus.query('ALERTS{alertstate="firing"}', at=run.ended)}
    assert firing <= {"ExpertdFallback"}


def test_how_long_metrics_take_under_load(run: Run) -> None:
    taken = sorted(run.scrape_s)
    print(f"/metrics under load: median {taken[len(taken) // 2] * 1000:.1f} ms, slowest {taken[-1] * 1000:.1f} ms")
    assert len(taken) > 10
