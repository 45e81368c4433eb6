"""What one request met, from arrival to its single end: the source of its metrics and of its line in the log.

No prompt, no answer and no client-chosen text but the sanitised request id ever gets here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from expertd_engine.messages import SequenceStats
from expertd_server.engine_client import Update
from expertd_server.errors import ApiError, ClientDisconnected, Unavailable
from expertd_server.metrics import Metrics

logger = logging.getLogger("expertd.requests")

_REJECTIONS = {
    "draining": "draining",
    "model_loading": "loading",
    "engine_dead": "engine_dead",
    "request_too_large": "too_large",
    "rate_limit_exceeded": "rate",
}


class RequestRecord:
    """One request. `start` when its sequences are submitted, `saw` for each update, `finish` exactly once in effect."""

    def __init__(self, metrics: Metrics, endpoint: str, request_id: str) -> None:
        self.arrival_s = time.monotonic()
        self._metrics = metrics
        self._endpoint = endpoint
        self._request_id = request_id
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._first_s: float | None = None
        self._first_by_sequence: dict[int, float] = {}
        self._last_by_sequence: dict[int, float] = {}
        self._tokens_by_sequence: dict[int, int] = {}
        self._stats: list[SequenceStats] = []
        self._started = False
        self._finished = False
        self.stream = False
        self.model: str | None = None
        """The one that serves, once that is known."""

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Whatever is raised in the block is how the request ended."""
        try:
            yield
        except BaseException as error:
            self.finish(error=error)
            raise

    def start(self, prompt_tokens: int) -> None:
        """The engine has the request; `prompt_tokens` counts each prompt once."""
        self._started = True
        self._prompt_tokens = prompt_tokens
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.request_prompt_tokens.observe(prompt_tokens)

    def saw(self, update: Update) -> None:
        """Time and count what the engine sent for one sequence."""
        if update.output is not None and update.output.cached_tokens:
            self._cached_tokens += update.output.cached_tokens
            self._metrics.cached_prompt_tokens.inc(update.output.cached_tokens)
        if update.output is not None and update.output.token_ids:
            self._saw_tokens(update.sequence_id, len(update.output.token_ids))
        if update.finished is not None:
            self._saw_end(update.sequence_id, update.finished.stats)

    def _saw_tokens(self, sequence_id: int, count: int) -> None:
        now = time.monotonic()
        self._completion_tokens += count
        self._metrics.generation_tokens.inc(count)
        if self._first_s is None:
            self._first_s = now
            self._metrics.ttft.observe(now - self.arrival_s)
        if sequence_id in self._last_by_sequence:
            self._metrics.inter_token.observe((now - self._last_by_sequence[sequence_id]) / count)
        self._first_by_sequence.setdefault(sequence_id, now)
        self._last_by_sequence[sequence_id] = now
        self._tokens_by_sequence[sequence_id] = self._tokens_by_sequence.get(sequence_id, 0) + count

    def _saw_end(self, sequence_id: int, stats: SequenceStats) -> None:
        self._stats.append(stats)
        self._metrics.queue.observe(stats.queue_s)
        self._metrics.prefill.observe(stats.prefill_s)
        self._metrics.decode.observe(stats.decode_s)
        gaps = self._tokens_by_sequence.get(sequence_id, 0) - 1
        if gaps > 0:
            spent = self._last_by_sequence[sequence_id] - self._first_by_sequence[sequence_id]
            self._metrics.per_output_token.observe(spent / gaps)

    def finish(self, reasons: Sequence[str] = (), error: BaseException | None = None) -> None:
        """The request is over. `reasons` are those of its choices; an error stands above them. Later calls are void:
        whoever is nearest to the cause reports it first."""
        if self._finished:
            return
        self._finished = True
        reason = self._outcome(reasons, error)
        never_begun = isinstance(error, Unavailable) and error.bound == "queue_wait"
        if self._started and not never_begun:
            self._metrics.requests.labels(self._endpoint, reason).inc()
            self._metrics.request_generation_tokens.observe(self._completion_tokens)
            if reason != "abort":
                self._metrics.e2e.observe(time.monotonic() - self.arrival_s)
        elif isinstance(error, ApiError) and not isinstance(error, ClientDisconnected) and error.status != 500:
            self._metrics.rejected.labels(_rejection(error)).inc()
        self._log(reason, error)

    @staticmethod
    def _outcome(reasons: Sequence[str], error: BaseException | None) -> str:
        if isinstance(error, (asyncio.CancelledError, GeneratorExit, ClientDisconnected)):
            return "abort"
        if error is not None:
            return "error"
        return "length" if "length" in reasons else "stop"

    def _log(self, reason: str, error: BaseException | None) -> None:
        def total(name: str) -> Any:
            return sum(getattr(stats, name) for stats in self._stats)

        now = time.monotonic()
        logger.info(
            "request",
            extra={
                "fields": {
                    "request_id": self._request_id,
                    "route": self._endpoint,
                    "model": self.model,
                    "stream": self.stream,
                    "status": _status(reason, error),
                    "finish_reason": reason,
                    "error": error.code if isinstance(error, ApiError) else None,
                    "prompt_tokens": self._prompt_tokens,
                    "completion_tokens": self._completion_tokens,
                    "cached_tokens": self._cached_tokens,
                    "ttft_ms": _ms(self._first_s - self.arrival_s) if self._first_s is not None else None,
                    "total_ms": _ms(now - self.arrival_s),
                    "queue_ms": _ms(max((stats.queue_s for stats in self._stats), default=0.0)),
                    "stall_ms": _ms(total("stall_s")),
                    "expert_hits": total("expert_hits"),
                    "expert_late": total("expert_late"),
                    "expert_misses": total("expert_misses"),
                    "loaded_bytes": total("loaded_bytes"),
                    "substitutions": total("substituted"),
                    "preemptions": total("preemptions"),
                }
            },
        )


def _status(reason: str, error: BaseException | None) -> int:
    """As HTTP would say it, of streams too, whose own was sent before their end was known."""
    if reason == "abort":
        return ClientDisconnected.status
    if error is None:
        return 200
    return error.status if isinstance(error, ApiError) else 500


def _rejection(error: ApiError) -> str:
    if isinstance(error, Unavailable) and error.code == Unavailable.code:
        return error.bound
    return _REJECTIONS.get(error.code, "invalid")


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
