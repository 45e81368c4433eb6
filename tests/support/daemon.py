"""`expertd serve` as a user runs it: its own process, a real engine, a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_S = 240.0


class RunningDaemon:
    """The process and a client of it. Standard error is collected in `lines`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._listening.wait(START_S):
            raise AssertionError(f"it never listened: {self.lines}")
        self.http = httpx.Client(base_url=self.url, timeout=START_S)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if match := re.search(r"listening on (http://\S+)", line):
                self.url = match[1]
                self._listening.set()
        self._listening.set()

    def until_ready(self) -> None:
        end_s = time.monotonic() + START_S
        while self.http.get("/ready").status_code != 200:
            assert self.process.poll() is None, f"it ended: {self.lines[-5:]}"
            assert time.monotonic() < end_s, "it never became ready"
            time.sleep(0.1)

    def engine_pid(self) -> int:
        """The child process that runs the engine."""
        listed = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "expertd_engine --connect"], capture_output=True, text=True
        )
        return int(listed.stdout.split()[0])

    def metrics(self) -> dict[str, float]:
        """Every sample's value by its name, summed over labels."""
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    def fresh_metrics(self) -> dict[str, float]:
        """`metrics` with the engine's numbers from after this call."""
        began_s = time.monotonic()
        while (now := self.metrics())["expertd_metrics_snapshot_age_seconds"] >= time.monotonic() - began_s:
            assert time.monotonic() < began_s + START_S, "no snapshot came"
            time.sleep(0.05)
        return now

    def stop(self) -> int:
        """As an operator stops it; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def close(self) -> None:
        """Let go of a process that has ended."""
        self.http.close()
        self._reader.join(START_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def daemon(
    model: str | Path, *flags: str, cgroup: Path | None = None, environment: dict[str, str] | None = None
) -> Iterator[RunningDaemon]:
    """Serve `model` on a free port, inside `cgroup` if one is given, and wait until it is ready.

    It starts cold, unless `environment` says otherwise: stores are shared by tests.
    """
    variables = {**os.environ, "EXPERTD_WARM_RESTART": "off", **(environment or {})}
    command: Sequence[str] = [sys.executable, "-m", "expertd_server", "serve", str(model), "--port", "0", *flags]
    if cgroup is not None:
        command = ["/bin/sh", "-c", f'echo $$ > "{cgroup}/cgroup.procs" && exec "$@"', "sh", *command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=variables)
    running = None
    try:
        running = RunningDaemon(process)
        running.until_ready()
        yield running
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        if running is not None:
            running.close()
