"""Dashboards: built from their source, every panel with unit, legend and words, every query with data behind it."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from support import prometheus as p

BUILD = p.ROOT / "deploy" / "grafana" / "build.py"
PROVISIONED = p.ROOT / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"


def _build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", BUILD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[dict[str, str]]]:
    """Label sets by name of sample, of everything recorded of a real run."""
    series: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(p.recorded_text()):
        for sample in family.samples:
            series.setdefault(sample.name, []).append(sample.labels)
    return series


def test_the_files_are_what_their_source_builds() -> None:
    build = _build()
    assert {path.stem for path in p.DASHBOARDS.glob("*.json")} == build.ALL.keys()
    for name in build.ALL:
        assert (p.DASHBOARDS / f"{name}.json").read_text(encoding="utf-8") == build.rendered(name), "run build.py"


def test_dashboards_are_fit_for_provisioning() -> None:
    loaded = [json.loads(path.read_text(encoding="utf-8")) for path in p.DASHBOARDS.glob("*.json")]
    assert len({one["uid"] for one in loaded}) == 3
    for one in loaded:
        assert one["id"] is None and 39 <= one["schemaVersion"] <= 42
        assert "${" not in json.dumps(one), "file provisioning resolves no inputs"
        ids = [panel["id"] for panel in one["panels"]]
        assert len(ids) == len(set(ids))
    assert f"uid: {_build().SOURCE['uid']} " in PROVISIONED.read_text()


@pytest.mark.parametrize(
    ("dashboard", "panel"), list(p.panels()), ids=lambda x: x if isinstance(x, str) else x["title"]
)
def test_a_panel_says_what_it_shows(dashboard: str, panel: Any) -> None:
    assert panel["fieldConfig"]["defaults"]["unit"] and len(panel["description"]) > 4
    assert panel["targets"] and panel["datasource"]["uid"] == "expertd-prometheus"
    assert all(target["legendFormat"] for target in panel["targets"])
    for target in panel["targets"]:
        windows = re.findall(r"\[([^\]]+)\]", target["expr"])
        assert set(windows) <= {"$__rate_interval", "$__range"}, target["expr"]
        assert "$instance" in target["expr"] or "expertd:" in target["expr"]


def selectors(node: Any) -> list[promql_parser.VectorSelector]:
    """All vector selectors of a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    if isinstance(node, promql_parser.MatrixSelector):
        return [node.vector_selector]
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs")] + list(getattr(node, "args", []))
    return [found for child in children if child is not None for found in selectors(child)]


def matches(selector: promql_parser.VectorSelector, labels: dict[str, str]) -> bool:
    """Whether a series is what the selector asks for."""
    for matcher in selector.matchers.matchers:
        value, kind = labels.get(matcher.name, ""), str(matcher.op).rpartition(".")[2]
        equal = (
            value == matcher.value if kind in ("Equal", "NotEqual") else re.fullmatch(matcher.value, value) is not None
        )
        if equal is not (kind in ("Equal", "Re")):
            return False
    return True


@pytest.mark.parametrize(("panel", "query"), p.queries())
def test_what_a_query_selects_was_there_in_a_real_run(
    panel: str, query: str, recorded: dict[str, list[dict[str, str]]]
) -> None:
    found = selectors(promql_parser.parse(p.without_rules(query)))
    assert found
    for selector in found:
        if selector.name == "expertd_fallback_info":
            continue  # there is none unless something is amiss
        assert any(matches(selector, labels) for labels in recorded.get(selector.name or "", [])), str(selector)


def test_every_rule_and_alert_selects_what_was_there(recorded: dict[str, list[dict[str, str]]]) -> None:
    names = {name for text in _expressions() for name in re.findall(r"\bexpertd_[a-z0-9_]+", text)}
    assert names - {"expertd_fallback_info"} <= recorded.keys()
    rules = {name for text in _expressions() for name in re.findall(r"\bexpertd:[a-z0-9_:]+", text)}
    assert rules <= p.recording_rules().keys()


def _expressions() -> list[str]:
    groups = [group for path in p.RULES.glob("*.yml") for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def test_prometheus_answers_every_query_from_the_recording(tmp_path: Path) -> None:
    """Where Prometheus is installed: the recorded run as its data, every panel evaluated at the run's end."""
    text = p.recorded_text()
    (tmp_path / "run.om").write_text(text)
    (tmp_path / "data").mkdir()
    subprocess.run(
        [p.tool("promtool"), "tsdb", "create-blocks-from", "openmetrics", tmp_path / "run.om", tmp_path / "data"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    end = max(float(line.rpartition(" ")[2]) for line in text.splitlines() if not line.startswith("#"))
    with p.prometheus(tmp_path, {"global": {}}) as running:
        for panel, query in p.queries():
            values = [value for _, value in running.query(p.without_rules(query), at=end)]
            assert [value for value in values if not math.isnan(value)], f"{panel}: {query}"
