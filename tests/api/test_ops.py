"""Models, probes, version, metrics and the published description."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import openai

from support.fake_engine import Script
from support.fake_numbers import engine_info
from support.fake_store import MAX_MODEL_LEN, MODEL_NAME
from support.running_server import Server, Start

COMPLETIONS = 'expertd_requests_total{endpoint="/v1/completions",finish_reason="%s"}'


def test_the_models_route_lists_what_is_served(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [m.id for m in models] == [MODEL_NAME]
    assert models[0].model_dump()["max_model_len"] == MAX_MODEL_LEN
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME


def test_a_served_name_takes_the_place_of_the_models_own(start: Start) -> None:
    server = start(served_model_name="mine")
    assert server.complete(model="mine").json()["model"] == "mine"
    assert server.complete(model=MODEL_NAME).status_code == 404


def test_probes_answer_when_ready(server: Server) -> None:
    for path in ("/live", "/livez", "/ping", "/ready", "/readyz", "/health", "/v1/health", "/version", "/metrics"):
        assert server.http.get(path).status_code == 200, path
    assert server.http.get("/metrics/").status_code == 200


def test_while_loading_the_server_is_alive_and_refuses_work(start: Start) -> None:
    server = start(ready=False)
    assert server.http.get("/live").status_code == 200
    server.until(lambda: server.http.get("/ready").json().get("stage") == "convert")
    for path in ("/ready", "/health"):
        assert server.http.get(path).status_code == 503
        assert server.http.get(path).json() == {"status": "loading", "stage": "convert", "progress": 0.25}
    for response in (server.complete(), server.complete(stream=True), server.http.get("/v1/models")):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "model_loading"
        assert int(response.headers["retry-after"]) > 0
    server.launcher.store_ready.set()
    server.until_ready()
    assert server.complete().status_code == 200


def test_the_version_shows_what_the_engine_reports_and_no_path(server: Server) -> None:
    body = server.http.get("/version").json()
    assert body["engine"]["numerics"] == "invariant"
    assert body["engine"]["fallbacks"] == ["direct I/O was refused"]
    assert "secret" not in str(body)


def test_every_answer_of_the_description_is_declared(server: Server) -> None:
    schema = server.http.get("/openapi.json").json()
    post = schema["paths"]["/v1/completions"]["post"]
    assert {"200", "400", "404", "413", "415", "500", "503"} <= post["responses"].keys()
    assert "422" not in post["responses"]
    reference = post["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    request = schema["components"]["schemas"][reference.rpartition("/")[2]]
    assert request["required"] == ["prompt"]
    assert {"type": "null"} in request["properties"]["temperature"]["anyOf"]
    assert "StreamOptions" in schema["components"]["schemas"]


def test_zeros_exist_before_the_first_request(start: Start) -> None:
    metrics = start().metrics()
    for reason in ("stop", "length", "abort", "error"):
        assert metrics[COMPLETIONS % reason] == 0
    assert metrics['expertd_requests_rejected_total{reason="queue_full"}'] == 0
    assert metrics['expertd_expert_lookups_total{layer="1",result="miss",tier="disk"}'] == 0
    assert metrics['expertd_engine_restarts_total{reason="exit"}'] == 0
    assert metrics["expertd_ready"] == metrics["expertd_engine_up"] == 1
    assert metrics['expertd_fallback_info{fallback="direct I/O was refused"}'] == 1
    assert not [name for name in metrics if "_created" in name]


def test_requests_and_tokens_are_counted(start: Start) -> None:
    server = start()
    server.complete(max_tokens=5)
    server.complete(prompt=["a", "b"], n=2, max_tokens=1, stream=True)
    server.complete(max_tokens=-1)
    server.until(lambda: server.metrics()["expertd_engine_steps_total{" + 'phase="decode"}'] >= 6)
    metrics = server.metrics()
    assert metrics[COMPLETIONS % "length"] == 2
    assert metrics['expertd_requests_rejected_total{reason="invalid"}'] == 1
    assert metrics["expertd_prompt_tokens_total"] == 2 + 2
    assert metrics["expertd_generation_tokens_total"] == 5 + 4
    assert metrics["expertd_time_to_first_token_seconds_count"] == 2
    assert metrics["expertd_e2e_request_latency_seconds_count"] == 2
    assert metrics["expertd_inter_token_latency_seconds_count"] == 4
    assert metrics["expertd_request_queue_seconds_count"] == 5
    assert metrics['expertd_http_requests_total{method="POST",route="/v1/completions",status="200"}'] == 2


def test_the_engines_numbers_agree_with_each_other(start: Start) -> None:
    server = start()
    server.complete(max_tokens=5)
    server.until(lambda: server.metrics()["expertd_requests_running"] == 0)
    metrics = server.metrics()
    moved = [v for k, v in metrics.items() if k.startswith("expertd_swap_bytes_total")]
    assert sum(moved) == 2 * 4096 * 5
    issued = metrics['expertd_swap_transfers_total{from_tier="disk",kind="prefetch",to_tier="host"}']
    outcomes = sum(v for k, v in metrics.items() if k.startswith("expertd_expert_prefetch_total"))
    assert outcomes + metrics["expertd_expert_prefetch_pending"] == issued
    held = [metrics[f'expertd_memory_{k}_bytes{{pool="experts",tier="host"}}'] for k in ("resident", "reserved")]
    assert sum(held) <= metrics['expertd_memory_budget_bytes{pool="experts",tier="host"}']
    assert metrics['expertd_swap_transfer_seconds_bucket{from_tier="disk",le="+Inf",to_tier="host"}'] == 5
    assert 0 <= metrics["expertd_metrics_snapshot_age_seconds"] < 60


def test_unmatched_paths_do_not_become_labels(start: Start) -> None:
    server = start()
    server.http.get("/secret/../path")
    server.http.request("BREW", "/live")
    routes = [name for name in server.metrics() if name.startswith("expertd_http_requests_total")]
    assert any('route="unmatched"' in name for name in routes)
    assert not any("secret" in name or "BREW" in name for name in routes)


def test_a_memory_budget_is_reported_only_where_there_is_one(start: Start) -> None:
    with_budget = start(Script(info=engine_info(memory_budget_bytes=10**9))).metrics()
    assert with_budget["expertd_total_memory_budget_bytes"] == 10**9
    assert "expertd_total_memory_budget_bytes" not in start().metrics()


def test_metrics_speak_openmetrics_where_asked(server: Server) -> None:
    plain = server.http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    asked = server.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert asked.headers["content-type"].startswith("application/openmetrics-text")
    assert asked.text.endswith("# EOF\n")


def test_the_server_never_imports_torch() -> None:
    code = (
        "import sys, expertd_server.daemon, expertd_server.cli, expertd_server.supervisor;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert _output(code) == "[]\n"


def _output(code: str) -> str:
    async def run() -> bytes:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parent
        )
        return (await process.communicate())[0]

    return asyncio.run(run()).decode()
