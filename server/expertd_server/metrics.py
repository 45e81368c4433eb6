"""The server's own metrics, and the registry that /metrics renders. Label sets are closed; zeros exist from the start.

What the engine counts is in `engine_metrics`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from starlette.routing import compile_path

from expertd_engine.messages import EngineInfo
from expertd_engine.snapshot import Snapshot
from expertd_server import __version__
from expertd_server.engine_metrics import EngineCounters

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_GAP_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
IPC_BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)
TOKEN_COUNT_BUCKETS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = (
    "queue_full", "queued_tokens", "queue_wait", "bodies", "rate", "draining", "loading", "engine_dead", "too_large",
    "invalid",
)  # fmt: skip
RESTARTS = ("exit", "wedged", "start")
OTHER_ROUTE = "unmatched"

disable_created_metrics()  # type: ignore[no-untyped-call]  # a `_created` gauge beside every counter is noise in every browser of series


class Metrics:
    """Owner of the registry and of every metric the server counts itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineCounters()
        self.registry.register(self.engine)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._routes: dict[str, re.Pattern[str]] = {}
        """By template: the paths that it stands for."""
        self._add_requests()
        self._add_latencies()
        self._add_state()

    def _add_requests(self) -> None:
        self.requests = self._counter(
            "requests_total",
            "Requests ended, by how.",
            ("endpoint", "finish_reason"),
            [(e, r) for e in ENDPOINTS for r in FINISH_REASONS],
        )
        self.rejected = self._counter(
            "requests_rejected_total", "Requests refused before any work.", ("reason",), [(r,) for r in REJECTIONS]
        )
        self.prompt_tokens = self._counter("prompt_tokens_total", "Tokens of prompts accepted.")
        self.cached_prompt_tokens = self._counter(
            "cached_prompt_tokens_total",
            "Prompt tokens whose keys and values were found, not computed; one per choice.",
        )
        self.generation_tokens = self._counter("generation_tokens_total", "Tokens generated.")
        self.http_requests = self._counter(
            "http_requests_total", "HTTP requests answered; route is the template.", ("route", "method", "status")
        )
        self.http_in_flight = self._gauge(
            "http_requests_in_flight", "HTTP requests being answered; route is the template.", ("route",)
        )

    def _add_latencies(self) -> None:
        self.queue = self._histogram("request_queue_seconds", "Arrival of a sequence to its first step.", TTFT_BUCKETS)
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "Arrival of a request to its first token.", TTFT_BUCKETS
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Gap between the tokens of a sequence.", TOKEN_GAP_BUCKETS
        )
        self.per_output_token = self._histogram(
            "time_per_output_token_seconds", "Mean gap between tokens, once per ended sequence.", TOKEN_GAP_BUCKETS
        )
        self.e2e = self._histogram(
            "e2e_request_latency_seconds", "Arrival of a request to its end, aborted ones left out.", REQUEST_BUCKETS
        )
        self.prefill = self._histogram("prefill_seconds", "Prefill of a sequence.", REQUEST_BUCKETS)
        self.decode = self._histogram("decode_seconds", "Decode of a sequence.", REQUEST_BUCKETS)
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", TOKEN_COUNT_BUCKETS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for a request.", TOKEN_COUNT_BUCKETS
        )
        self.ipc_delay = self._histogram(
            "ipc_delay_seconds", "From the taking of the engine's numbers to their reading here.", IPC_BUCKETS
        )

    def _add_state(self) -> None:
        self.transfer_threads = Gauge(
            "expertd_transfer_threads", "Threads that read experts from the store.", registry=self.registry
        )
        self.ready = Gauge("expertd_ready", "1 while requests are taken.", registry=self.registry)
        self.engine_up = Gauge("expertd_engine_up", "1 while an engine process serves.", registry=self.registry)
        self.ipc_queue = Gauge(
            "expertd_ipc_queue_depth", "Tokens from the engine that their requests have not taken yet.",
            registry=self.registry,
        )  # fmt: skip
        self.restarts = self._counter(
            "engine_restarts_total", "Engine processes started again, by why.", ("reason",), [(r,) for r in RESTARTS]
        )
        self.build_info = self._gauge("build_info", "Version of the server.", ("version",))
        self.build_info.labels(__version__).set(1)
        self.model_info = self._gauge(
            "model_info",
            "The model served.",
            ("model_name", "model_type", "dtype", "layers", "experts", "top_k", "numerics", "kernels", "step_path"),
        )
        self.budget_info = self._gauge("budget_info", "How the budget is used.", ("policy", "lookahead", "prefetch"))
        self.fallback_info = self._gauge(
            "fallback_info", "A path that runs slower or weaker than designed.", ("fallback",)
        )

    def serve_routes(self, methods_by_path: Mapping[str, Iterable[str]], queued_tokens: Callable[[], int]) -> None:
        """The routes that there are: their zeros begin. `queued_tokens` is asked at each scrape."""
        self._routes = {path: compile_path(path)[0] for path in methods_by_path}
        self.ipc_queue.set_function(queued_tokens)
        for path, methods in methods_by_path.items():
            for method in methods:
                self.http_requests.labels(path, method, "200")
        for path in (*methods_by_path, OTHER_ROUTE):
            self.http_in_flight.labels(path)

    def route_of(self, path: str) -> str:
        """The template of the route that `path` leads to, whether or not a request is let in there."""
        if path in self._routes:
            return path
        return next((route for route, paths in self._routes.items() if paths.match(path)), OTHER_ROUTE)

    def observe(self, snapshot: Snapshot) -> None:
        """The engine has sent its numbers; both processes read the same clock."""
        self.engine.observe(snapshot)
        self.ipc_delay.observe(max(0.0, time.monotonic() - snapshot.time_s))

    def engine_ready(self, model_name: str, info: EngineInfo) -> None:
        """An engine serves: say what, and begin its counters."""
        self.engine.engine_started(info)
        self.engine_up.set(1)
        self._only(
            self.model_info,
            (
                *(model_name, info.model_type, info.dtype, info.num_moe_layers, info.num_experts, info.top_k),
                *(info.numerics, info.kernels, info.step_path),
            ),
        )
        self._only(self.budget_info, (info.policy, info.lookahead, str(info.prefetch).lower()))
        self.fallback_info.clear()
        for fallback in info.fallbacks:
            self.fallback_info.labels(fallback).set(1)

    def engine_ended(self) -> None:
        """The engine's gauges are over; its counts stay."""
        self.engine.engine_ended()
        self.engine_up.set(0)

    def _only(self, gauge: Gauge, labels: Iterable[object]) -> None:
        gauge.clear()
        gauge.labels(*labels).set(1)

    def _counter(
        self, name: str, text: str, labels: tuple[str, ...] = (), children: Iterable[tuple[str, ...]] = ()
    ) -> Counter:
        counter = Counter("expertd_" + name, text, labels, registry=self.registry)
        for child in children:
            counter.labels(*child)
        return counter

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge("expertd_" + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram("expertd_" + name, text, buckets=tuple(buckets), registry=self.registry)
