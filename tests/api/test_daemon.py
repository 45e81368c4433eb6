"""The whole daemon with a real engine, as clients meet it. A small model; the demo in a cgroup under `acceptance`."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch

from expertd_engine.prepare import prepare
from support.daemon import RunningDaemon, daemon
from support.demo import CACHE, PROMPTS
from support.memory_cgroup import can_limit_memory, limited_memory, num_kills
from support.tiny_mixtral import make_mixtral


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_mixtral(folder / "checkpoint")
    prepare(folder / "checkpoint", folder / "store", "bf16")
    return folder / "store"


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[RunningDaemon]:
    with daemon(tiny, "--expert-budget", "25%", "--max-model-len", "128", "--threads", "1") as running:
        yield running


def complete(url: str, **body: object) -> str:
    answer = httpx.post(f"{url}/v1/completions", json={"temperature": 0, "ignore_eos": True, **body}, timeout=120)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a card, its kernels may be wanted")
def test_nothing_is_loaded_that_only_a_card_needs(served: RunningDaemon) -> None:
    assert "triton" not in Path(f"/proc/{served.engine_pid()}/maps").read_text()


def drop_or_read(url: str, seed: int) -> str:
    """One client: streaming or not, reading to the end or gone after a random number of events."""
    rng = random.Random(seed)
    body = {
        "prompt": f"client {seed}", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": rng.random() < 0.7
    }  # fmt: skip
    leaves = rng.random() < 0.5
    patience = rng.randrange(12)
    timeout = httpx.Timeout(120, read=0.3 + 0.05 * patience if leaves and not body["stream"] else 120)
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=timeout) as answer:
            for count, line in enumerate(answer.iter_lines()):
                if leaves and body["stream"] and count >= patience:
                    return "left"
                if line == "data: [DONE]":
                    return "done"
        return "done"
    except httpx.ReadTimeout:
        return "left"


def until_idle(running: RunningDaemon) -> dict[str, float]:
    end_s = time.monotonic() + 30
    while True:
        now = running.metrics()
        if (
            now["expertd_requests_running"]
            == now["expertd_requests_waiting"]
            == now["expertd_kv_cache_used_bytes"]
            == 0
        ):
            return now
        assert time.monotonic() < end_s, f"never idle: {now}"
        time.sleep(0.1)


def test_32_clients_of_whom_half_leave(served: RunningDaemon) -> None:
    alone = complete(served.url, prompt="the same before and after", max_tokens=16)
    before = until_idle(served)
    with ThreadPoolExecutor(32) as pool:
        outcomes = list(pool.map(lambda seed: drop_or_read(served.url, seed), range(32)))
    assert {"left", "done"} == set(outcomes)
    after = until_idle(served)
    assert after["expertd_requests_total"] - before["expertd_requests_total"] == 32
    assert after["expertd_engine_restarts_total"] == 0
    resident, budget = after["expertd_memory_resident_bytes"], after["expertd_memory_budget_bytes"]
    assert budget > 0 and resident > 0
    assert complete(served.url, prompt="the same before and after", max_tokens=16) == alone


def test_the_official_client(served: RunningDaemon) -> None:
    client = openai.OpenAI(base_url=served.url + "/v1", api_key="unused")
    model = client.models.list().data[0].id
    whole = client.completions.create(model=model, prompt="Hi", max_tokens=12, temperature=0)
    chunks = client.completions.create(
        model=model, prompt="Hi", max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    for chunk in chunks:
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole.choices[0].text
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 12


def test_swap_counters_are_the_disks(served: RunningDaemon) -> None:
    """Prefetch and demand bytes together are what the engine process made the disk read."""
    version = served.http.get("/version").json()
    if not version["engine"]["direct_io"]:
        pytest.skip("this file system refuses direct reads: the page cache answers instead of the disk")
    io = Path(f"/proc/{served.engine_pid()}/io")
    until_idle(served)
    swapped, before = served.fresh_metrics()["expertd_swap_bytes_total"], _read_bytes(io)
    complete(served.url, prompt="read some experts", max_tokens=30)
    until_idle(served)
    moved = served.fresh_metrics()["expertd_swap_bytes_total"] - swapped
    assert moved > 0
    assert _read_bytes(io) - before == pytest.approx(moved, rel=0.05)


def _read_bytes(io: Path) -> int:
    return int(dict(line.split(": ") for line in io.read_text().splitlines())["read_bytes"])


@pytest.mark.acceptance
@pytest.mark.cgroup
@pytest.mark.skipif(not can_limit_memory(), reason="needs root and a memory cgroup")
def test_a_cgroup_of_exactly_the_memory_budget() -> None:
    budget = 720 * 2**20
    with limited_memory(budget) as group:
        flags = ("--memory-budget", str(budget), "--max-model-len", "1024", "--cache-dir", str(CACHE))
        with daemon("demo", *flags, cgroup=group.folder) as running:
            with ThreadPoolExecutor(8) as pool:
                texts = list(
                    pool.map(lambda i: complete(running.url, prompt=PROMPTS[i % 20], max_tokens=24), range(50))
                )
            assert texts[:10] == texts[20:30] == texts[40:50]
            now = running.metrics()
            print(
                f"\ncgroup of {budget} bytes: 50 requests, kills {num_kills(group)}, "
                f"peak charged {group.peak_bytes()}, used {now['expertd_memory_used_bytes']:.0f}, "
                f"experts {now['expertd_memory_budget_bytes']:.0f}"
            )
            assert running.stop() == 0
        assert num_kills(group) == 0
