"""Keys: every route is closed unless meant to be open, however its path is spelt; CORS is off unless asked for."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from expertd_engine.config import Config
from expertd_engine.errors import ConfigError
from expertd_server.auth import NO_KEYS, PUBLIC_PATHS, KeyRing
from expertd_server.daemon import Daemon, bind
from support.fake_engine import FakeLauncher, Script
from support.fake_store import MODEL_NAME
from support.running_server import Server, Start, running

KEYS = KeyRing.of(["first-key", "second-key"], ["admin-key"])
BEARER = {"authorization": "Bearer first-key"}


@pytest.fixture(scope="module")
def closed(store: Path) -> Iterator[Server]:
    """A server that asks for keys. Stateless tests share it."""
    with running(store) as start:
        yield start(keys=KEYS)


def routes(server: Server) -> set[tuple[str, str]]:
    """(method, path) of everything registered, hidden routes included."""
    found = set()
    pending: list[Any] = list(server.daemon._http.config.app.routes)  # type: ignore[union-attr]  # it is the application
    while pending:
        route = pending.pop()
        pending += getattr(route, "original_router", route).routes if hasattr(route, "original_router") else []
        for method in getattr(route, "methods", None) or ():
            found.add((method, route.path.replace("{model_id:path}", MODEL_NAME)))
    return found


def ask(server: Server, method: str, raw_path: str, **headers: str) -> int:
    """The status for a path sent exactly as given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, raw_path, body=b"{}" if method == "POST" else None, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def spellings(path: str) -> list[str]:
    """Other ways to write a path that a careless rule, proxy or router takes for the same."""
    return [
        path, path + "/", "/" + path, path.upper(), path.replace("/", "%2f"), path.replace("/", "//"),
        "/v1/.." + path, path + "?key=first-key", "/x" + path, path + ";a=b", path + "%00", "/." + path,
        path.replace("e", "%65", 1), f"http://127.0.0.1{path}", path + "#live", "/live/.." + path, "/live" + path,
    ]  # fmt: skip


def test_every_route_but_the_public_ones_is_closed_however_it_is_spelt(closed: Server) -> None:
    everything = routes(closed)
    assert {("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/openapi.json")} <= everything
    for _, path in sorted(everything):
        if path in PUBLIC_PATHS:
            continue
        for raw in spellings(path):
            for method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS"):
                status = ask(closed, method, raw)
                assert status in (400, 401, 404, 405), (method, raw, status)
            assert ask(closed, "POST", raw, authorization="Bearer wrong") in (400, 401, 404, 405), raw
    for method, path in everything:
        if path not in PUBLIC_PATHS:
            assert ask(closed, method, path) == 401, (method, path)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", sorted(PUBLIC_PATHS))
def test_probes_need_no_key(closed: Server, method: str, path: str) -> None:
    response = closed.http.request(method, path)
    assert response.status_code == 200
    assert bool(response.content) == (method == "GET")


def test_probes_are_public_for_reading_alone(closed: Server) -> None:
    assert closed.http.post("/live").status_code == 401
    assert closed.http.post("/live", headers=BEARER).status_code == 405


@pytest.mark.parametrize(
    "headers",
    [
        BEARER, {"authorization": "bearer second-key"}, {"authorization": "BEARER  first-key"},
        {"x-api-key": "first-key"}, {"authorization": "Basic abc", "x-api-key": "second-key"},
        {"authorization": "Bearer admin-key"},
    ],
)  # fmt: skip
def test_a_key_opens(closed: Server, headers: dict[str, str]) -> None:
    assert closed.http.post("/v1/completions", json={"prompt": "a"}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"authorization": "Bearer"}, {"authorization": "first-key"},
        {"authorization": "Basic first-key"}, {"authorization": "Bearer first-keyy"}, {"x-api-key": ""},
        {"x-api-key": "FIRST-KEY"}, {"authorization": "Bearer first-key,second-key"}, {"cookie": "key=first-key"},
        {"authorization": b"Bearer \xff\xfe"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_a_key_is_401_in_our_form(closed: Server, headers: dict[str, Any], stream: bool) -> None:
    response = closed.http.post("/v1/completions", json={"prompt": "a", "stream": stream}, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert "first" not in response.text


def test_the_official_client_knows_what_is_wrong(closed: Server) -> None:
    with (
        openai.OpenAI(base_url=closed.url + "/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.models.list()
    assert refused.value.code == "invalid_api_key"


def test_admin_routes_take_the_admin_key_alone(closed: Server, server: Server) -> None:
    """There may be no such route yet: what counts is who gets as far as the router."""
    for path in ("/admin", "/admin/x", "/admin%2fx"):
        assert ask(closed, "POST", path) == 401
        assert ask(closed, "POST", path, authorization="Bearer first-key") == 403
        assert ask(closed, "POST", path, authorization="Bearer admin-key") in (404, 405)
        assert ask(server, "POST", path) == 401, "a server without keys has no administrator"


def test_refusals_for_want_of_a_key_are_counted_by_the_route_that_was_asked_for(start: Start) -> None:
    server = start(keys=KEYS, public_metrics=True)
    for method, path in (("PUT", "/admin/budget"), ("GET", "/v1/models/some/model"), ("GET", "/secret")):
        assert ask(server, method, path) == 401
    counted = {name for name in server.metrics() if name.startswith("expertd_http_requests_total") and "401" in name}
    assert counted == {
        f'expertd_http_requests_total{{method="{method}",route="{route}",status="401"}}'
        for method, route in (("PUT", "/admin/budget"), ("GET", "/v1/models/{model_id:path}"), ("GET", "unmatched"))
    }


def test_without_keys_any_key_will_do(server: Server) -> None:
    assert server.http.post("/v1/completions", json={"prompt": "a"}, headers=BEARER).status_code == 200


def test_metrics_are_public_only_where_the_operator_says_so(start: Start, closed: Server) -> None:
    assert closed.http.get("/metrics").status_code == 401
    assert closed.http.get("/metrics", headers=BEARER).status_code == 200
    assert start(keys=KEYS, public_metrics=True).http.get("/metrics").status_code == 200


def test_one_key_cannot_take_the_room_of_others(start: Start) -> None:
    server = start(Script(held=True), keys=KEYS, max_per_key=2)
    with httpx.stream("POST", server.url + "/v1/completions", json={"prompt": "a", "n": 3}, headers=BEARER) as never:
        assert (never.status_code, never.headers["x-should-retry"]) == (429, "false")

    def ask_as(headers: dict[str, str], n: int) -> int:
        body = {"prompt": "a", "n": n}
        return httpx.post(server.url + "/v1/completions", json=body, headers=headers, timeout=10).status_code

    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask_as, BEARER, 2)
        server.until(lambda: server.daemon.service.admission.used == 2)
        refused = server.http.post("/v1/completions", json={"prompt": "a"}, headers=BEARER)
        second = pool.submit(ask_as, {"x-api-key": "second-key"}, 2)
        server.until(lambda: server.daemon.service.admission.used == 4)
        server.engine.allow(1000)
        assert first.result() == second.result() == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) > 0
    server.until(lambda: server.daemon.service.admission.used == 0)
    assert server.http.post("/v1/completions", json={"prompt": "a"}, headers=BEARER).status_code == 200


PREFLIGHT = {
    "origin": "http://app.example", "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang,x-stainless-retry-count",
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/live"])
def test_cors_is_off_by_default(server: Server, closed: Server, path: str) -> None:
    response = server.http.options(path, headers=PREFLIGHT)
    assert response.status_code == 405
    assert closed.http.options(path, headers=PREFLIGHT).status_code == 401
    assert "access-control-allow-origin" not in {**response.headers, **server.http.get(path, headers=PREFLIGHT).headers}


def test_cors_lets_in_the_origins_named(start: Start) -> None:
    server = start(keys=KEYS, cors_origin="http://app.example, https://b.example")
    allowed = server.http.options("/v1/completions", headers=PREFLIGHT)
    assert allowed.status_code == 200, "a preflight carries no key"
    assert allowed.headers["access-control-allow-origin"] == "http://app.example"
    assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
    other = server.http.options("/v1/completions", headers={**PREFLIGHT, "origin": "http://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    refused = server.http.get("/v1/models", headers={"origin": "https://b.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://b.example", "so that the page can read the error"
    assert "access-control-allow-credentials" not in refused.headers


# ---------------------------------------------------------------- where keys come from


def test_keys_come_from_files_and_the_environment_and_leave_the_latter(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\none\n\n  two  \n")
    (tmp_path / "admin").write_text("boss\n")
    environment = {"EXPERTD_API_KEY": "three,four", "PATH": "x"}
    config = Config(api_key_file=tmp_path / "keys", admin_key_file=tmp_path / "admin")
    keys = KeyRing.load(config, environment)
    assert environment == {"PATH": "x"}
    assert all(keys.find([key]) for key in ("one", "two", "three", "four"))
    found = keys.find(["nothing", "boss"])
    assert found is not None and found[1]
    assert not any(keys.find([key]) for key in ("# ours", "ours", "", "five"))
    assert "one" not in repr(keys)


@pytest.mark.parametrize("content", ["", "# nothing\n\n", "a key\x07\n", "schlüssel\n", "k" * 600])
def test_a_key_file_without_good_keys_is_refused_without_showing_them(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match=str(file)) as refused:
        KeyRing.load(Config(api_key_file=file), {})
    assert not any(word in str(refused.value) for word in ("schl", "kkk", "\x07"))


def test_a_key_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent: No such file"):
        KeyRing.load(Config(admin_key_file=tmp_path / "absent"), {})


def test_a_bound_per_key_without_keys_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="max_per_key"):
        KeyRing.load(Config(max_per_key=1), {})


@pytest.mark.parametrize(
    ("host", "keys", "warned"), [("0.0.0.0", NO_KEYS, 1), ("0.0.0.0", KEYS, 0), ("::1", NO_KEYS, 0)]
)
def test_an_open_port_without_keys_is_warned_about(
    store: Path, caplog: pytest.LogCaptureFixture, host: str, keys: KeyRing, warned: int
) -> None:
    async def make() -> None:
        with bind(host, 0) as listening:
            Daemon(Config(), listening, FakeLauncher(store), keys=keys)

    asyncio.run(make())
    assert [record.levelname for record in caplog.records if "give API keys" in record.message] == ["WARNING"] * warned
