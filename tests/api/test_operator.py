"""What operators look at and turn: /status, /experts, /ui, and the budget under /admin."""

from __future__ import annotations

import base64
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from expertd_engine.config import Config, Size
from expertd_engine.errors import ConfigError
from expertd_server.auth import KeyRing
from support.fake_engine import Script
from support.running_server import Server, Start

KEYS = KeyRing.of(["user-key"], ["admin-key"])
ADMIN = {"authorization": "Bearer admin-key"}


def basic(key: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}


def put_budget(server: Server, value: object) -> httpx.Response:
    return server.http.put("/admin/budget", json={"expert_budget": value}, headers=ADMIN)


def test_the_status_says_what_metrics_say(start: Start) -> None:
    server = start()
    server.complete(max_tokens=5)
    server.until(lambda: server.http.get("/status").json()["experts"]["lookups"] == 20)
    body = server.http.get("/status").json()
    assert body["status"] == "ready" and body["model"]["chat"]
    assert (body["experts"]["hit"], body["experts"]["hit_ratio"]) == (10, 0.5)
    assert body["experts"]["read_bytes"] == 5 * 8192
    assert body["tokens"] == {"prompt": 2, "generated": 5}
    assert body["memory"]["experts"]["budget"] == 16384
    assert (body["memory"]["experts"]["minimum"], body["memory"]["experts"]["maximum"]) == (8192, 32768)


def test_while_loading_the_status_says_how_far(start: Start) -> None:
    server = start(ready=False)
    server.until(lambda: server.http.get("/status").json().get("stage") == "convert")
    body = server.http.get("/status").json()
    assert (body["status"], body["progress"], body["snapshot_age_s"]) == ("loading", 0.25, None)
    assert "model" not in body


def test_the_map_of_experts_is_drawn_when_somebody_looks(start: Start) -> None:
    server = start()
    assert server.http.get("/experts").json() == {"age_s": None, "layers": []}
    server.until(lambda: server.http.get("/experts").json()["layers"] == ["Lr.o", "r..x"])
    server.engine.crash()
    server.launcher.wait_for_engine(2)
    server.until_ready()
    server.until(lambda: server.http.get("/experts").json()["layers"] == ["Lr.o", "r..x"])


@pytest.mark.parametrize(("asked", "bytes_"), [(12288, 12288), ("16KiB", 16384), ("75%", 24576)])
def test_the_budget_changes_while_serving(start: Start, asked: object, bytes_: int) -> None:
    answer = put_budget(start(keys=KEYS), asked)
    assert (answer.status_code, answer.json()) == (
        200,
        {"expert_budget_bytes": bytes_, "expert_limit_bytes": bytes_, "memory_budget_bytes": None,
         "minimum_bytes": 8192, "maximum_bytes": 32768},
    )  # fmt: skip


@pytest.mark.parametrize("asked", [1, 10**9, "much", "-3", True, 1.5, None, [], "200%"])
def test_a_budget_that_cannot_be_is_refused_by_name(start: Start, asked: object) -> None:
    answer = put_budget(start(keys=KEYS), asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expert_budget")


def test_a_budget_outlives_its_engine(start: Start) -> None:
    server = start(keys=KEYS)
    assert put_budget(server, 12288).status_code == 200
    server.engine.crash()
    server.launcher.wait_for_engine(2)
    server.until_ready()
    server.engine.wait_for(lambda: server.engine.budget == 12288)
    assert put_budget(server, 20480).json()["expert_budget_bytes"] == 20480


def test_who_waits_for_a_budget_hears_of_the_engines_end(start: Start) -> None:
    server = start(Script(deaf_to_budgets=True), keys=KEYS)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(put_budget, server, 12288)
        server.engine.wait_for(lambda: server.engine.budgets_asked == 1)
        server.engine.crash()
        answer = waiting.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")


def test_the_page_is_behind_the_key_that_a_browser_can_show(start: Start) -> None:
    server = start(keys=KEYS)
    refused = server.http.get("/ui")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Basic ")
    assert server.http.get("/ui", headers=basic("wrong")).status_code == 401
    for key in ("user-key", "admin-key"):
        page = server.http.get("/ui", headers=basic(key))
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert server.http.get("/status", headers=basic(key)).status_code == 200
    assert server.http.get("/status").headers["www-authenticate"] == "Bearer"
    assert put_budget(server, 12288).status_code == 200
    refused = server.http.put("/admin/budget", json={"expert_budget": 12288}, headers=basic("user-key"))
    assert refused.status_code == 403


def test_the_page_can_be_switched_off_and_asks_nobody_else(start: Start) -> None:
    assert start(ui=False).http.get("/ui").status_code == 404
    page = start().http.get("/ui")
    assert "http://" not in page.text and "https://" not in page.text
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "connect-src 'self'" in policy


def test_zeros_of_every_route_exist_and_requests_under_way_are_counted_by_route(start: Start) -> None:
    server = start(Script(held=True))
    metrics = server.metrics()
    assert metrics['expertd_http_requests_total{method="POST",route="/v1/responses",status="200"}'] == 0
    assert metrics['expertd_http_requests_in_flight{route="/v1/completions"}'] == 0
    with httpx.Client(base_url=server.url, timeout=10) as http:
        server.engine.allow(1)
        with http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 9}) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert server.metrics()['expertd_http_requests_in_flight{route="/v1/completions"}'] == 1
    server.until(lambda: server.metrics()['expertd_http_requests_in_flight{route="/v1/completions"}'] == 0)


def test_prompt_tokens_found_in_the_cache_are_counted(start: Start) -> None:
    server = start(Script(cached_tokens=2))
    server.complete(prompt="abcd", n=2, max_tokens=2)
    assert server.metrics()["expertd_cached_prompt_tokens_total"] == 4


def test_a_configuration_read_again_changes_budgets_and_nothing_else(start: Start) -> None:
    server = start()
    config = dataclasses.replace(server.daemon.service.config, expert_budget=Size(share=0.75), max_waiting=1)
    server.on_loop(lambda: server.daemon.reload(lambda: config))
    server.until(lambda: server.engine.budget == 24576)
    assert server.daemon.service.config.max_waiting != 1

    def broken() -> Config:
        raise ConfigError("no such option")

    server.on_loop(lambda: server.daemon.reload(broken))
    assert server.complete().status_code == 200 and server.engine.budget == 24576


@pytest.mark.parametrize(
    ("body", "at_fault"),
    [({}, "expert_budget"), ({"memory_budget": "50%"}, "memory_budget"), ({"memory_budget": "none"}, "memory_budget")],
)
def test_a_memory_budget_is_bytes(start: Start, body: dict[str, object], at_fault: str) -> None:
    answer = start(keys=KEYS).http.put("/admin/budget", json=body, headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, at_fault)
