"""`expertd bench serve`: concurrent streams over HTTP against a daemon of its own, as a client sees them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from expertd_engine.bench.cgroup import inside, limited_memory, num_kills
from expertd_engine.bench.http_load import Stream, get, run_streams
from expertd_engine.bench.options import Options
from expertd_engine.bench.report import finish, mebibytes, number, percent, spread
from expertd_engine.bench.stats import median_interval, percentile
from expertd_engine.errors import EngineError, UsageError
from expertd_engine.memory import peak_rss_bytes, process_tree

HEADER = ("run", "streams", "tok/s", "95 %", "TTFT p50", "TTFT p95", "gap p50", "gap p95", "hits", "read/token",
          "expert peak", "process peak")  # fmt: skip
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class _Round:
    """All streams once, and what the engine's counters say of them."""

    streams: Sequence[Stream]
    elapsed_s: float
    tokens: int
    counted: dict[str, float]


def serve(options: Options) -> str:
    """Run it; the report. Raises UsageError for what a daemon cannot be told."""
    engine = options.engine
    if (engine.routing, engine.hints) != ("model", "none") or options.peer or options.versus:
        raise UsageError("bench serve measures the daemon as it is: without --routing, --hints, --peer and --versus")
    if engine.device != "cpu":
        raise UsageError(f"--device {engine.device} is not allowed for bench serve: give cpu")
    with ExitStack() as stack:
        group = None if options.limit_bytes is None else stack.enter_context(limited_memory(options.limit_bytes))
        command = _command(options) if group is None else inside(group, _command(options))
        port, pid = stack.enter_context(running_daemon(command, options.timeout_s))
        vocabulary = _vocabulary(options)
        rounds = []
        for turn in range(options.pairs + 1):
            done = _round(options, port, vocabulary, turn)
            rounds += [done] if turn else []  # the first one warms up
        peak = sum(peak_rss_bytes(one) for one in process_tree(pid))
        expert_peak = _metrics(port).get("expertd_memory_peak_bytes", 0.0)
        kills = None if group is None else (num_kills(group), group.peak_bytes())
    values = _values(options, rounds) | {"peak_bytes": int(expert_peak), "process_peak_bytes": peak}
    notes = []
    if kills is not None:
        values |= {"oom_kill": kills[0], "cgroup_peak_bytes": kills[1]}
        notes.append(f"cgroup: {kills[0]} kills, {mebibytes(kills[1])} charged at most")
    title = f"serve: {options.store.index.name}, {options.engine.streams} streams of {options.tokens} tokens over HTTP"
    return finish(title, HEADER, [_row(values)], [*notes, ""], values)


def _command(options: Options) -> list[str]:
    engine = options.engine
    command = [sys.executable, "-m", "expertd_server", "serve", engine.store, "--port", "0"]
    flags: dict[str, object | None] = {
        "--expert-budget": engine.expert_budget, "--memory-budget": engine.memory_budget,
        "--expert-policy": engine.policy, "--threads": engine.threads, "--io-threads": engine.io_threads,
        "--max-step-tokens": engine.max_step_tokens, "--max-model-len": engine.max_model_len,
        "--max-sequences": engine.streams, "--device": engine.device,
    }  # fmt: skip
    return (
        command
        + [part for flag, value in flags.items() if value is not None for part in (flag, str(value))]
        + ["--prefetch" if engine.prefetch else "--no-prefetch"]
    )


@contextmanager
def running_daemon(command: Sequence[str], timeout_s: float) -> Iterator[tuple[int, int]]:
    """Port and process id of a daemon that is ready; it is stopped with the block."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    listening, lines = threading.Event(), []
    port = 0

    def read() -> None:
        nonlocal port
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if match := re.search(r"listening on http://[^ ]*:(\d+)", line):
                port = int(match[1])
                listening.set()
        listening.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        until_s = time.monotonic() + timeout_s
        listening.wait(timeout_s)
        while get(port, "/ready")[0] != 200:
            if process.poll() is not None or time.monotonic() > until_s:
                raise EngineError(f"the daemon never became ready: {' | '.join(lines[-3:])}")
            time.sleep(_POLL_S)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()
        reader.join()
        process.stderr.close()


def _vocabulary(options: Options) -> int:
    """Ids that every tokenizer of the store's vocabulary knows."""
    return int(json.loads((options.store.path / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def _round(options: Options, port: int, vocabulary: int, turn: int) -> _Round:
    before = _metrics(port)
    began = time.perf_counter()
    streams = run_streams(port, [options.prompt] * options.engine.streams, options.tokens, vocabulary, turn)
    elapsed_s = time.perf_counter() - began
    after = _metrics(port)
    counted = {name: after[name] - before.get(name, 0.0) for name in after}
    return _Round(streams, elapsed_s, options.engine.streams * options.tokens, counted)


def _metrics(port: int) -> dict[str, float]:
    """Every sample summed over labels; lookups by result besides. From a snapshot taken after this call."""
    began = time.monotonic()
    while True:
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(get(port, "/metrics")[1]):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
                if result := sample.labels.get("result"):
                    values[f"{sample.name}:{result}"] = values.get(f"{sample.name}:{result}", 0.0) + sample.value
        if values["expertd_metrics_snapshot_age_seconds"] < time.monotonic() - began:
            return values
        time.sleep(_POLL_S)


def _values(options: Options, rounds: Sequence[_Round]) -> dict[str, Any]:
    speeds = [one.tokens / one.elapsed_s for one in rounds]
    ttfts = [stream.ttft_s for one in rounds for stream in one.streams]
    gaps = [gap for one in rounds for stream in one.streams for gap in stream.gaps_s]
    lookups = sum(one.counted["expertd_expert_lookups_total"] for one in rounds)
    hits = sum(one.counted["expertd_expert_lookups_total:hit"] for one in rounds)
    tokens = sum(one.tokens for one in rounds)
    return {
        "command": "serve", "model": options.store.index.name, "experts_format": options.store.index.experts_format,
        "dense_format": options.store.index.dense_format, "device": f"cpu, {os.cpu_count()} cores",
        "streams": options.engine.streams, "prompt": options.prompt, "tokens": options.tokens, "rounds": len(rounds),
        "tok_s": median(speeds), "tok_s_interval": median_interval(speeds).as_json(),
        "ttft_p50_s": median(ttfts), "ttft_p95_s": percentile(ttfts, 0.95), "gap_p50_s": median(gaps),
        "gap_p95_s": percentile(gaps, 0.95), "hit_ratio": hits / max(1.0, lookups),
        "transferred_bytes_per_token": sum(one.counted["expertd_store_read_bytes_total"] for one in rounds) / tokens,
        "stall_s_per_token": sum(one.counted["expertd_stall_seconds_total"] for one in rounds) / tokens,
    }  # fmt: skip


def _row(values: dict[str, Any]) -> list[str]:
    interval = values["tok_s_interval"]
    return [
        "daemon", str(values["streams"]), number(values["tok_s"]), spread(interval["low"], interval["high"]),
        f"{1000 * values['ttft_p50_s']:.0f} ms", f"{1000 * values['ttft_p95_s']:.0f} ms",
        f"{1000 * values['gap_p50_s']:.1f} ms", f"{1000 * values['gap_p95_s']:.1f} ms", percent(values["hit_ratio"]),
        mebibytes(values["transferred_bytes_per_token"]), mebibytes(values["peak_bytes"]),
        mebibytes(values["process_peak_bytes"]),
    ]  # fmt: skip
