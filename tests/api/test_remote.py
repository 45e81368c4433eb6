"""`expertd health` and `expertd status` against a running server."""

from __future__ import annotations

import json

import pytest

from expertd_server.auth import KeyRing
from expertd_server.cli import main
from expertd_server.remote import default_url, shown, size
from support.fake_engine import Script
from support.running_server import Server, Start


def test_health_is_yes_or_no(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    loading = start(ready=False)
    assert main(["health", "--url", loading.url]) == 1
    assert '"loading"' in capsys.readouterr().err
    assert main(["health", "--live", "--url", loading.url]) == 0
    loading.launcher.store_ready.set()
    loading.until_ready()
    assert main(["health", "--url", loading.url]) == 0
    assert capsys.readouterr().out.endswith("ready\n")
    assert main(["health", "--url", "http://127.0.0.1:1"]) == 1
    assert main(["health", "--url", "nowhere"]) == 2


def test_health_needs_no_key_and_status_takes_it_from_the_environment(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(keys=KeyRing.of(["k"]))
    assert main(["health", "--url", server.url]) == 0
    assert main(["status", "--url", server.url]) == 1
    assert "401" in capsys.readouterr().err
    monkeypatch.setenv("EXPERTD_API_KEY", "k,other")
    assert main(["status", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "ready"


def test_status_shows_what_a_person_asks(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.complete(max_tokens=5)
    server.until(lambda: server.http.get("/status").json()["experts"]["lookups"] > 0)
    assert main(["status", "--url", server.url]) == 0
    out = capsys.readouterr().out
    assert "50.0% hits" in out and "of 16.0 KiB" in out and "fallback  direct I/O was refused" in out


def test_status_shows_what_happens_between_two_looks(start: Start) -> None:
    server = start(Script())
    earlier = server.http.get("/status").json()
    server.complete(max_tokens=5)
    server.until(lambda: server.http.get("/status").json()["experts"]["lookups"] == 20)
    later = server.http.get("/status").json()
    lines = shown(later, 12.0, (10.0, earlier))
    assert "now       2.5 tokens/s, 50% hits, 62% stalled, 20.0 KiB/s read" in lines


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"EXPERTD_HOST": "0.0.0.0", "EXPERTD_PORT": "81"}, "http://127.0.0.1:81"),
        ({"EXPERTD_HOST": "::"}, "http://[::1]:8000"),
        ({"EXPERTD_HOST": "fe80::1"}, "http://[fe80::1]:8000"),
    ],
)
def test_the_server_is_looked_for_where_it_listens(environment: dict[str, str], url: str) -> None:
    assert default_url(environment) == url


def test_sizes_are_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 * 2**30, 2**60)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 GiB", "1048576.0 TiB",
    ]  # fmt: skip
