"""A daemon is filled up to its budgets before its memory is told: with fakes for the daemon and what it answers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from expertd_engine.bench import full_daemon
from expertd_engine.errors import EngineError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.memory import peak_rss_bytes
from expertd_engine.planning.profile import MemoryProfile
from expertd_engine.warm_restart import NAME, Kept
from support.random_store import write_store

LIMITS = MemoryProfile(
    base=0, step=0, kv_block=1000, block_tokens=16, available=0, max_step_tokens=64, max_sequences=4, max_model_len=64,
)  # fmt: skip
RESIDENT, LIMIT, MINIMUM = 5000, 10_000, 2000


@dataclass
class FakeDaemon:
    """Its experts come one look after the other, up to `resident[-1]`."""

    resident: list[int]
    command: list[str] = field(default_factory=list)
    kept: Kept | None = None
    beside: set[str] = field(default_factory=set)
    streams: tuple[int, ...] = ()

    @contextmanager
    def run(self, command: Sequence[str], timeout_s: float) -> Iterator[tuple[int, int]]:
        folder = Path(command[command.index("serve") + 1])
        self.command = list(command)
        self.kept = msgspec.msgpack.decode((folder / NAME).read_bytes(), type=Kept)
        self.beside = {file.name for file in folder.iterdir()} - {NAME}
        yield 8000, os.getpid()

    def status(self, port: int, path: str) -> tuple[int, str]:
        assert (port, path) == (8000, "/status")
        resident = self.resident.pop(0) if len(self.resident) > 1 else self.resident[0]
        return 200, json.dumps({"memory": {"experts": {"resident": resident, "limit": LIMIT, "minimum": MINIMUM}}})

    def answer(self, port: int, *asked: int) -> list[object]:
        self.streams = asked
        return []


def faked(patch: pytest.MonkeyPatch, *resident: int) -> FakeDaemon:
    daemon = FakeDaemon(list(resident))
    patch.setattr(full_daemon, "running_daemon", daemon.run)
    patch.setattr(full_daemon, "get", daemon.status)
    patch.setattr(full_daemon, "run_streams", daemon.answer)
    patch.setattr(full_daemon, "_POLL_S", 0.0)
    return daemon


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    write_store(tmp_path / "store")
    (tmp_path / "store" / "config.json").write_text('{"vocab_size": 257}')
    return ExpertStore.open(tmp_path / "store")


def test_experts_and_kv_fill_their_budgets_before_memory_is_read(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store.path / NAME).write_bytes(b"what an earlier engine left")
    daemon = faked(monkeypatch, 0, RESIDENT, LIMIT - MINIMUM, LIMIT - MINIMUM + 1)
    filled = full_daemon.fill(store, LIMITS, {"--expert-budget": LIMIT}, kv_blocks=9)
    assert daemon.resident == [LIMIT - MINIMUM + 1], "it looked on until nothing more fits"
    streams, prompt, answer, vocabulary, _ = daemon.streams
    assert (streams, prompt + answer, vocabulary) == (2, 64, 257), "9 blocks hold two sequences of 64 tokens"
    assert (filled.experts, filled.kv) == (LIMIT - MINIMUM + 1, 2 * 4 * 1000)
    assert filled.peak >= peak_rss_bytes() // 2 > 0
    flags = dict(zip(daemon.command[-12::2], daemon.command[-11::2], strict=True))
    assert flags == {
        "--kv-budget": "9000", "--max-model-len": "64", "--max-sequences": "4", "--max-step-tokens": "64",
        "--max-queue-wait-s": "86400", "--expert-budget": str(LIMIT),
    }  # fmt: skip


def test_every_expert_is_named_as_if_the_daemon_had_been_warm(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = faked(monkeypatch, LIMIT)
    full_daemon.fill(store, LIMITS, {}, kv_blocks=1, longest=16)
    assert daemon.kept is not None and daemon.kept.store_id == store.index.store_id
    assert daemon.kept.remember.residents == tuple(store.experts())
    assert daemon.beside == {file.name for file in store.path.iterdir()}
    assert daemon.streams[:3] == (1, 16 - full_daemon.ANSWER, full_daemon.ANSWER), "one stream at least"


def test_a_daemon_that_does_not_fill_is_an_error(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, RESIDENT)
    monkeypatch.setattr(full_daemon, "START_S", 0.01)
    with pytest.raises(EngineError, match=f"has loaded experts of {RESIDENT} bytes .* fewer than fit"):
        full_daemon.fill(store, LIMITS, {}, kv_blocks=9)
