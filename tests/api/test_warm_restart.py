"""After SIGTERM and a restart experts are loaded before anybody asks, and the first tokens hit as the last did."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from expertd_engine.messages import Sampling
from expertd_engine.prepare import prepare
from expertd_engine.warm_restart import NAME
from support.daemon import RunningDaemon, daemon
from support.engine import generate, running_engine
from support.tiny_mixtral import make_mixtral

WARM = {"EXPERTD_WARM_RESTART": "on"}
FLAGS = ("--expert-budget", "40%", "--no-prefetch", "--threads", "1", "--no-prefix-cache")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    make_mixtral(folder / "model", num_hidden_layers=6, max_position_embeddings=512)
    return prepare(folder / "model", folder / "store", "float32").path


def tokens(running: RunningDaemon, count: int) -> float:
    """Generate so many; the hit rate that they met."""
    before = running.http.get("/status").json()["experts"]
    body = {"prompt": "once upon a time", "max_tokens": count, "temperature": 0.9, "seed": 3, "ignore_eos": True}
    assert running.http.post("/v1/completions", json=body).status_code == 200
    found = settled(running, before["lookups"])
    return float((found["hit"] - before.get("hit", 0)) / (found["lookups"] - before["lookups"]))


def settled(running: RunningDaemon, above: float) -> dict[str, float]:
    """The counters once the engine has told of what it did last."""
    end_s = time.monotonic() + 30
    last: dict[str, float] = {"lookups": -1}
    while time.monotonic() < end_s:
        found = running.http.get("/status").json()
        if not found["requests"]["running"] and found["experts"]["lookups"] == last["lookups"] > above:
            return last
        last = found["experts"]
        time.sleep(0.3)
    raise AssertionError("the counters never settled")


def resident(running: RunningDaemon) -> int:
    return int(running.http.get("/status").json()["memory"]["experts"]["resident"])


def test_the_first_100_tokens_after_a_restart_hit_as_the_last_before(store: Path) -> None:
    with daemon(store, *FLAGS, environment=WARM) as running:
        tokens(running, 100)
        steady, held = tokens(running, 100), resident(running)
        assert running.stop() == 0
    assert (store / NAME).is_file()
    with daemon(store, *FLAGS, environment=WARM) as running:
        end_s = time.monotonic() + 30
        while resident(running) < held:  # nobody asks for anything
            assert time.monotonic() < end_s, "it stays cold"
            time.sleep(0.1)
        assert running.http.get("/status").json()["experts"]["lookups"] == 0
        assert tokens(running, 100) >= 0.9 * steady


def test_what_cannot_be_read_is_a_cold_start(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    (store / NAME).write_bytes(b"nonsense")
    with running_engine(store, expert_budget="40%", threads=1, warm_restart=True) as engine:
        assert engine.warm is not None
        engine.warm.recall()
        (generated,) = generate(engine, [[1, 2, 3]], Sampling(max_tokens=4, ignore_eos=True))
    assert len(generated.token_ids) == 4 and "starting cold: cannot read" in caplog.text
