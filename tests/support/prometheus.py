"""A real Prometheus, where it is installed: scraping a daemon, or reading what was recorded of one."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules"
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
RECORDING = ROOT / "tests" / "deploy" / "recorded_run.om.gz"
"""Scrapes of a real daemon under load, as OpenMetrics text; `tests/deploy/record.py` makes it anew."""

START_S = 30.0
VARIABLES = {"$__rate_interval": "30s", "$__range": "1m", "$instance": ".*"}


def tool(name: str) -> str:
    """The path of `prometheus` or `promtool`; skips where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install prometheus)")
    return path


def panels() -> Iterator[tuple[str, Any]]:
    """(dashboard, panel) of everything that ships."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            yield path.stem, panel


def queries() -> list[tuple[str, str]]:
    """(dashboard/panel, query) of every panel, with Grafana's variables given values."""
    found = []
    for dashboard, panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            found.append((f"{dashboard}/{panel['title']}", query))
    return found


def recording_rules() -> dict[str, str]:
    """Expression by name."""
    groups = [group for path in RULES.glob("*.yml") for group in yaml.safe_load(path.read_text())["groups"]]
    return {rule["record"]: rule["expr"].strip() for group in groups for rule in group["rules"] if "record" in rule}


def without_rules(query: str) -> str:
    """The query with the expressions of recording rules in the place of their names."""
    rules = recording_rules()
    return re.sub(r"(expertd:[\w:]+)(\{[^}]*\})?", lambda match: f"({rules[match[1]]})", query)


def recorded_text() -> str:
    return gzip.decompress(RECORDING.read_bytes()).decode()


class Prometheus:
    """Its HTTP interface."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)

    def query(self, expression: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of an instant query. Raises AssertionError where Prometheus refuses it."""
        parameters: dict[str, str | float] = {"query": expression} | ({"time": at} if at else {})
        answer = self.http.get("/api/v1/query", params=parameters).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        return [(sample["metric"], float(sample["value"][1])) for sample in answer["data"]["result"]]

    def over_time(self, expression: str, begin: float, end: float, step_s: float = 1.0) -> dict[str, list[float]]:
        """Values at each step, by the labels as text."""
        parameters: dict[str, str | float] = {"query": expression, "start": begin, "end": end, "step": step_s}
        answer = self.http.get("/api/v1/query_range", params=parameters).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        return {str(s["metric"]): [float(value) for _, value in s["values"]] for s in answer["data"]["result"]}


@contextmanager
def prometheus(folder: Path, config: Mapping[str, Any]) -> Iterator[Prometheus]:
    """One with this configuration, its data in `folder`."""
    (folder / "prometheus.yml").write_text(json.dumps(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=20y", "--log.level=error",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    running = Prometheus(f"http://127.0.0.1:{port}")
    try:
        _until_ready(running, process)
        yield running
    finally:
        running.http.close()
        process.terminate()
        process.wait(30)


def _until_ready(running: Prometheus, process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + START_S
    while True:
        try:
            if running.http.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert process.poll() is None and time.monotonic() < end_s, "Prometheus did not start"
        time.sleep(0.1)


def scraping(target: str, seconds: float = 1.0) -> dict[str, Any]:
    """A configuration that scrapes `target` (host:port) as the shipped one does, but more often."""
    every = f"{seconds:g}s"
    return {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(path) for path in sorted(RULES.glob("*.yml"))],
        "scrape_configs": [{"job_name": "expertd", "static_configs": [{"targets": [target]}]}],
    }


def as_openmetrics(scrapes: Iterable[tuple[float, str]]) -> str:
    """(time, text of /metrics) as one OpenMetrics text, each sample with its time, job and instance."""
    kinds: dict[str, str] = {}
    samples: dict[str, list[tuple[str, float, str]]] = {}
    for at, text in scrapes:
        family = ""
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                _, _, family, kind = line.split(" ", 3)
                kinds[family] = kind
            elif line and not line.startswith("#"):
                labels = line.rpartition(" ")[0].partition("{")[2].rstrip("}")
                metric = re.sub(r',?le="[^"]*"', "", labels).strip(",")
                samples.setdefault(family, []).append((metric, at, _stamped(line, at)))
    lines: list[str] = []
    for family, found in samples.items():
        name = family.removesuffix("_total") if kinds[family] == "counter" else family
        lines.append(f"# TYPE {name} {kinds[family]}")
        lines += [line for _, _, line in sorted(found, key=lambda one: one[:2])]  # metric by metric, each in its order
    return "\n".join([*lines, "# EOF", ""])


def _stamped(line: str, at: float) -> str:
    series, _, value = line.rpartition(" ")
    name, brace, labels = series.partition("{")
    inside = f"{labels.rpartition('}')[0]}," if brace else ""
    return f'{name}{{{inside}job="expertd",instance="recorded:8000"}} {value} {at:.3f}'
