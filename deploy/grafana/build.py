"""Writes dashboards/*.json: `python deploy/grafana/build.py`. What panels have in common is said here once.

Plain data for Grafana's file provisioning: a fixed data source (provisioning/datasources), no ids, schema version 39,
which Grafana 10.4 and later take as it is or migrate upwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "expertd-prometheus"}
ON = 'instance=~"$instance"'
OF_EXPERTS = ', pool="experts"'
WIDTH, HEIGHT = 24, 8

Target = tuple[str, str]
"""Query and legend."""


def panel(
    title: str, unit: str, *targets: Target, text: str, kind: str = "timeseries", width: int = 8, **more: Any
) -> Any:
    """One panel. `text` says how to read it; `more` goes into `fieldConfig.defaults` (min, max, thresholds, custom)."""
    instant = kind != "timeseries"
    return {
        "title": title,
        "type": kind,
        "description": text,
        "datasource": SOURCE,
        "gridPos": {"w": width, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, **more}, "overrides": []},
        "options": _options(kind),
        "targets": [
            {"refId": chr(65 + i), "expr": query, "legendFormat": legend, "datasource": SOURCE, "instant": instant,
             "range": not instant}
            for i, (query, legend) in enumerate(targets)
        ],
    }  # fmt: skip


def _options(kind: str) -> Any:
    reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    if kind == "timeseries":
        return {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {"reduceOptions": reduce, "orientation": "auto"} | ({"displayMode": "lcd"} if kind == "bargauge" else {})


def stacked() -> Any:
    """`custom=` of a panel whose series add up."""
    return {"fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}}


def quantiles(metric: str, *shares: float) -> list[Target]:
    """Percentiles of a histogram, from its buckets."""
    return [
        (
            f"histogram_quantile({q}, sum by (le) (rate(expertd_{metric}_bucket{{{ON}}}[$__rate_interval])))",
            f"p{q * 100:g}",
        )
        for q in shares
    ]


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Increase a second, summed, `by` labels if given."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate(expertd_{metric}{{{ON}{where}}}[$__rate_interval]))"


def total(metric: str, by: str = "", where: str = "") -> str:
    """The value of a gauge, summed."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (expertd_{metric}{{{ON}{where}}})"


def recorded(name: str, where: str = "") -> str:
    """What a recording rule has made."""
    return f"expertd:{name}{{{ON}{where}}}"


SERVING = [
    panel(
        "Ready",
        "short",
        (total("ready"), "takes requests"),
        (total("engine_up"), "engine up"),
        kind="stat",
        width=4,
        min=0,
        max=1,
        text="1 while requests are taken; 1 while an engine process serves.",
    ),
    panel(
        "Model",
        "short",
        (f"expertd_model_info{{{ON}}}", "{{model_name}}: {{dtype}}, {{layers}} × {{experts}}, top {{top_k}}"),
        kind="stat",
        width=8,
        text="What is served.",
    ),
    panel(
        "Running and waiting",
        "short",
        (total("requests_running"), "running"),
        (total("requests_waiting"), "waiting"),
        width=12,
        text="Sequences in the engine. Waiting that does not go down: more load than this box carries.",
    ),
    panel(
        "Tokens",
        "suffix: tokens/s",
        (rate("generation_tokens_total"), "generated"),
        (rate("prompt_tokens_total"), "prompt"),
        (rate("cached_prompt_tokens_total"), "prompt, found in the cache"),
        text="Throughput.",
    ),
    panel(
        "Time to first token",
        "s",
        *quantiles("time_to_first_token_seconds", 0.5, 0.95, 0.99),
        min=0,
        text="Arrival of a request to its first token: queue, prefill, and loading the experts of the prompt.",
    ),
    panel(
        "Gap between tokens",
        "s",
        *quantiles("inter_token_latency_seconds", 0.5, 0.95, 0.99),
        min=0,
        text="What a reader of a stream sees.",
    ),
    panel(
        "Whole requests",
        "s",
        *quantiles("e2e_request_latency_seconds", 0.5, 0.95, 0.99),
        min=0,
        text="Arrival to end; aborted ones left out.",
    ),
    panel(
        "Time per output token",
        "s",
        *quantiles("time_per_output_token_seconds", 0.5, 0.99),
        min=0,
        text="Mean gap, once per sequence.",
    ),
    panel(
        "Waiting for the first step",
        "s",
        *quantiles("request_queue_seconds", 0.5, 0.99),
        min=0,
        text="Time in the queue.",
    ),
    panel(
        "How requests end",
        "reqps",
        (rate("requests_total", "finish_reason"), "{{finish_reason}}"),
        custom=stacked(),
        text="stop and length are well; abort: the client left; error: look at the log.",
    ),
    panel(
        "Refused",
        "reqps",
        (rate("requests_rejected_total", "reason"), "{{reason}}"),
        custom=stacked(),
        text="By the bound that was met. invalid is the client's; the others say what to raise.",
    ),
    panel("HTTP", "reqps", (rate("http_requests_total", "status"), "{{status}}"), custom=stacked(), text="By status."),
    panel(
        "Steps",
        "s",
        *[
            (
                f'histogram_quantile(0.5, sum by (le) (rate(expertd_engine_step_seconds_bucket{{{ON}, phase="{p}"}}'
                "[$__rate_interval])))",
                f"{p}, p50",
            )
            for p in ("prefill", "decode")
        ],
        min=0,
        text="Duration of a forward pass. prefill: with any prompt token in it.",
    ),
    panel(
        "Tokens in a step",
        "short",
        (
            f"{rate('engine_step_tokens_sum', 'phase')} / ({rate('engine_step_tokens_count', 'phase')} > 0)",
            "{{phase}}, mean",
        ),
        min=0,
        text="How full steps are: more sequences at once share one reading of the experts.",
    ),
    panel(
        "Lengths",
        "suffix: tokens",
        *[
            (f"histogram_quantile(0.9, sum by (le) (rate(expertd_{m}_bucket{{{ON}}}[$__rate_interval])))", legend)
            for m, legend in (("request_prompt_tokens", "prompt, p90"), ("request_generation_tokens", "answer, p90"))
        ],
        min=0,
        text="Of requests.",
    ),
    panel(
        "Keys and values",
        "percentunit",
        (f"max(expertd_kv_cache_usage_ratio{{{ON}}})", "held by sequences"),
        (f"{total('kv_cache_cached_bytes')} / ({total('kv_cache_capacity_bytes')} > 0)", "kept for prompts to come"),
        min=0,
        max=1,
        text="Share of KV blocks. Full, with preemptions beside it: give more kv budget, or fewer sequences.",
    ),
    panel(
        "KV pressure",
        "ops",
        (rate("preemptions_total"), "preemptions"),
        (rate("kv_cache_evictions_total"), "evictions"),
        min=0,
        text="Preempted sequences start over: time lost. Evictions only cost later prompts.",
    ),
    panel(
        "Prefix cache",
        "percentunit",
        (f"{rate('prefix_cache_hits_total')} / ({rate('prefix_cache_queries_total')} > 0)", "found"),
        min=0,
        max=1,
        text="Share of prompt tokens whose keys and values were at hand.",
    ),
]

EXPERTS = [
    panel(
        "Hit rate",
        "percentunit",
        (recorded("expert_hit_ratio"), "lookups"),
        (recorded("expert_activation_hit_ratio"), "token choices"),
        (recorded("expert_budget_ratio"), "share of experts in the budget"),
        min=0,
        max=1,
        text="*The* hit rate: distinct (step, layer, expert) lookups that found their expert resident. Compare the "
        "share of experts that fit: above it, the policy earns its keep; far below it, the cache is being flushed.",
    ),
    panel(
        "Budget",
        "bytes",
        (total("memory_budget_bytes", where=OF_EXPERTS), "budget"),
        (
            f"{total('memory_resident_bytes', where=OF_EXPERTS)} + {total('memory_reserved_bytes', where=OF_EXPERTS)}",
            "resident and loading",
        ),
        (total("memory_limit_bytes", where=OF_EXPERTS), "limit in force"),
        (total("memory_peak_bytes", where=OF_EXPERTS), "highest ever"),
        min=0,
        text="Is the budget true? Resident and loading never exceed the limit in force; that is the budget, unless "
        "it was lowered a moment ago.",
    ),
    panel(
        "Time lost waiting, and why",
        "percentunit",
        (rate("stall_seconds_total", "cause"), "{{cause}}"),
        min=0,
        custom=stacked(),
        text="Share of time in which compute stood still. disk_read: an expert was being read, so a faster disk, more "
        "budget or better lookahead helps. expert_wait: no slot came free, so the budget is too small.",
    ),
    panel(
        "Lookups",
        "ops",
        (rate("expert_lookups_total", "result, tier"), "{{result}} ({{tier}})"),
        custom=stacked(),
        min=0,
        text="hit: resident; late: its load was under way; miss: nobody had asked for it. With the tier where it was.",
    ),
    panel(
        "Hit rate by layer",
        "percentunit",
        (recorded("expert_layer_hit_ratio"), "{{layer}}"),
        kind="bargauge",
        width=16,
        min=0,
        max=1,
        text="A layer far below the others routes more widely, or its hints come too late.",
    ),
    panel(
        "Lookahead covers",
        "percentunit",
        (recorded("lookahead_coverage_ratio"), "covered"),
        min=0,
        max=1,
        text="Lookups that lookahead had named before they came.",
    ),
    panel(
        "What became of prefetches",
        "ops",
        (rate("expert_prefetch_total", "outcome"), "{{outcome}}"),
        custom=stacked(),
        min=0,
        text="used: there in time; late: demanded before it came; wasted: read in vain; cancelled: given up unread.",
    ),
    panel(
        "Prefetched bytes in vain",
        "percentunit",
        (recorded("prefetch_wasted_ratio"), "wasted"),
        min=0,
        max=1,
        text="Above one half for long: switch prefetch off, or give more budget.",
    ),
    panel(
        "Swap bandwidth",
        "Bps",
        (recorded("swap_bandwidth_bytes"), "moved"),
        (recorded("swap_capacity_bytes"), "what the disk gives when busy"),
        min=0,
        text="When the first line comes near the second, the disk is the limit.",
    ),
    panel(
        "Bytes by cause",
        "Bps",
        (rate("swap_bytes_total", "kind"), "{{kind}}"),
        custom=stacked(),
        min=0,
        text="demand: read because a step waited; prefetch: read because it was foreseen.",
    ),
    panel("One read", "s", *quantiles("swap_transfer_seconds", 0.5, 0.99), min=0, text="From when a thread began it."),
    panel(
        "Reads under way",
        "short",
        (total("swap_queue_depth"), "waiting or being read"),
        (total("expert_prefetch_pending"), "prefetches whose outcome is open"),
        min=0,
        text="The queue before the disk.",
    ),
    panel(
        "Stall of a step",
        "s",
        *[
            (
                f"histogram_quantile({q}, sum by (le) (rate(expertd_step_stall_seconds_bucket{{{ON}, "
                f'cause="disk_read"}}[$__rate_interval])))',
                f"p{q * 100:g}",
            )
            for q in (0.5, 0.99)
        ],
        min=0,
        text="Of the steps that waited for reads: for how long.",
    ),
    panel(
        "Experts resident",
        "short",
        (total("experts_resident", "layer"), "{{layer}}"),
        kind="bargauge",
        width=16,
        min=0,
        text="In slots, by layer.",
    ),
    panel(
        "Tiers",
        "bytes",
        (total("expert_bytes", "tier"), "{{tier}}"),
        min=0,
        text="Where expert bytes are: all on disk, some in memory.",
    ),
    panel(
        "Evictions",
        "ops",
        (rate("expert_evictions_total", "reason"), "{{reason}}"),
        custom=stacked(),
        min=0,
        text="capacity: another expert needed the slot; budget_change: the budget was lowered.",
    ),
    panel(
        "Substitutions",
        "percentunit",
        (f"{rate('expert_substitutions_total')} / ({rate('expert_activations_total')} > 0)", "of token choices"),
        min=0,
        max=1,
        text="Answered by another expert than the router chose. Exact mode has none.",
    ),
    panel(
        "Reads that failed",
        "short",
        (f"sum(increase(expertd_expert_load_failures_total{{{ON}}}[$__range]))", "in this time"),
        kind="stat",
        width=8,
        min=0,
        text="Anything but zero: look at the disk and at the log.",
    ),
]

HOST = [
    panel(
        "Memory, as the kernel counts it",
        "bytes",
        (total("memory_used_bytes", "source"), "used ({{source}})"),
        (total("memory_used_peak_bytes", "source"), "highest ever ({{source}})"),
        (total("total_memory_budget_bytes"), "memory budget"),
        min=0,
        width=12,
        text="Server, engine and children together. Without --memory-budget there is no third line.",
    ),
    panel(
        "What memory is for",
        "bytes",
        (total("memory_resident_bytes", "pool"), "{{pool}}"),
        custom=stacked(),
        min=0,
        width=12,
        text="The rest up to what the kernel counts is libraries, buffers of steps and Python.",
    ),
    panel(
        "Gave experts back",
        "short",
        (f"sum(increase(expertd_memory_shrinks_total{{{ON}}}[$__range]))", "in this time"),
        kind="stat",
        width=6,
        min=0,
        text="Times that memory was above its budget in spite of the plan.",
    ),
    panel(
        "Engine restarts",
        "short",
        (f"sum by (reason) (increase(expertd_engine_restarts_total{{{ON}}}[$__range]))", "{{reason}}"),
        kind="stat",
        width=6,
        min=0,
        text="exit: it ended; wedged: it said nothing and was killed.",
    ),
    panel(
        "Runs slower than designed",
        "short",
        (
            f"expertd_fallback_info{{{ON}}} or on () label_replace(sum(expertd_ready{{{ON}}}) * 0, "
            '"fallback", "nothing does", "", "")',
            "{{fallback}}",
        ),
        kind="stat",
        width=12,
        text="Each fallback in one sentence.",
    ),
    panel(
        "Processor",
        "percentunit",
        (rate("engine_cpu_seconds_total"), "engine"),
        (f'sum(rate(process_cpu_seconds_total{{job="expertd", {ON}}}[$__rate_interval]))', "server"),
        min=0,
        text="Cores in use.",
    ),
    panel("Read from disk", "Bps", (rate("store_read_bytes_total"), "read"), min=0, text="By transfer threads."),
    panel(
        "Transfer threads busy",
        "percentunit",
        (f"{rate('swap_seconds_total')} / {total('transfer_threads')}", "busy"),
        min=0,
        max=1,
        text="Near 1: the disk, or the number of --io-threads, is the limit.",
    ),
    panel(
        "Server process",
        "bytes",
        (f'sum(process_resident_memory_bytes{{job="expertd", {ON}}})', "resident"),
        min=0,
        text="The HTTP side alone.",
    ),
    panel(
        "Open files",
        "short",
        (f'sum(process_open_fds{{job="expertd", {ON}}})', "open"),
        (f'sum(process_max_fds{{job="expertd", {ON}}})', "allowed"),
        min=0,
        text="One for each connection.",
    ),
    panel(
        "HTTP requests under way", "short", (total("http_requests_in_flight"), "requests"), min=0, text="Of all routes."
    ),
    panel(
        "Age of the engine's numbers",
        "s",
        (f"max(expertd_metrics_snapshot_age_seconds{{{ON}}})", "age"),
        min=0,
        text="A second when idle, less at work. A minute: the engine hangs.",
    ),
    panel(
        "Between the processes", "s", *quantiles("ipc_delay_seconds", 0.5, 0.99), min=0, text="From engine to server."
    ),
    panel(
        "Tokens not yet taken",
        "short",
        (total("ipc_queue_depth"), "tokens"),
        min=0,
        text="Slow readers, or a busy event loop.",
    ),
]


def laid_out(panels: Sequence[Any]) -> Iterator[Any]:
    """Each panel beside the one before, or at the beginning of the next row."""
    x = y = 0
    for number, one in enumerate(panels, 1):
        width = one["gridPos"]["w"]
        if x + width > WIDTH:
            x, y = 0, y + HEIGHT
        yield {"id": number, **one, "gridPos": {"x": x, "y": y, "w": width, "h": HEIGHT}}
        x += width


def dashboard(uid: str, title: str, panels: Sequence[Any]) -> Any:
    """A whole dashboard, for one instance or several."""
    instance = {
        "name": "instance", "label": "Instance", "type": "query", "datasource": SOURCE, "refresh": 2, "multi": True,
        "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
        "query": {"query": "label_values(expertd_ready, instance)", "refId": "instances"},
    }  # fmt: skip
    return {
        "id": None, "uid": uid, "title": title, "tags": ["expertd"], "schemaVersion": 39, "version": 1,
        "editable": False, "refresh": "10s", "time": {"from": "now-1h", "to": "now"}, "timezone": "browser",
        "templating": {"list": [instance]}, "annotations": {"list": []}, "panels": list(laid_out(panels)),
        "links": [{"title": "expertd", "type": "dashboards", "tags": ["expertd"], "asDropdown": False}],
    }  # fmt: skip


ALL = {
    "serving": dashboard("expertd-serving", "expertd: Serving", SERVING),
    "experts": dashboard("expertd-experts", "expertd: Expert tiers", EXPERTS),
    "host": dashboard("expertd-host", "expertd: Host", HOST),
}


def rendered(name: str) -> str:
    """The file of that dashboard."""
    return json.dumps(ALL[name], indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in ALL:
        (DASHBOARDS / f"{name}.json").write_text(rendered(name), encoding="utf-8")
