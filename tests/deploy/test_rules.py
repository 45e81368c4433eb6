"""Recording rules and alerts: sound, each alert tested, by promtool where it is installed."""

from __future__ import annotations

import re
import subprocess

import yaml

from support import prometheus as p

FOLDER = p.ROOT / "deploy" / "prometheus"


def promtool(*arguments: str) -> str:
    done = subprocess.run([p.tool("promtool"), *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_shipped_configuration_is_sound() -> None:
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")


def test_rules_and_alerts_do_what_they_say() -> None:
    assert "SUCCESS" in promtool("test", "rules", "tests/rules.test.yml")


def test_every_alert_is_tested_and_says_who_is_to_hear_of_it() -> None:
    tested = (FOLDER / "tests" / "rules.test.yml").read_text()
    groups = yaml.safe_load((FOLDER / "rules" / "alerts.yml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"]]
    assert {rule["alert"] for rule in alerts} == set(re.findall(r'alertname[:=] ?"?(\w+)', tested))
    assert all(rule["labels"]["severity"] in ("page", "ticket", "info") for rule in alerts)
    assert all("instance" in rule["annotations"]["summary"] for rule in alerts)
