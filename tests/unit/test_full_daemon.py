"""A daemon is filled up to its budgets before its memory is told: with fakes for the daemon and what it answers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    streams: tuple[Any, ...] = ()

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

    def answer(self, port: int, *asked: Any) -> list[object]:
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
    prompts, answer, vocabulary, _ = daemon.streams
    assert [prompt + answer for prompt in prompts] == [64, 16, 32, 32] and vocabulary == 257
    assert (filled.experts, filled.kv) == (LIMIT - MINIMUM + 1, 9 * 1000)
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
    assert daemon.streams[:2] == ([8], 8), "one stream at least"


@pytest.mark.parametrize(("kv_blocks", "longest"), [(2912, 8192), (512, 8192), (513, 256), (600, 8192), (33, 512)])
def test_every_block_is_in_use_at_once_as_far_as_sequences_reach(kv_blocks: int, longest: int) -> None:
    limits = msgspec.structs.replace(LIMITS, max_sequences=32, max_step_tokens=512, max_model_len=8192)
    lengths, answer = full_daemon.contexts(limits, kv_blocks, longest)
    assert lengths[0] == longest == max(lengths) and len(lengths) <= 32
    assert sum(lengths) == 16 * min(kv_blocks, 32 * longest // 16)
    assert min(lengths) > answer
    prompts = sum(lengths) - answer * len(lengths)
    last_begins = prompts / (512 - len(lengths))  # steps, if each takes what decodes leave of its tokens
    assert answer >= min(last_begins + full_daemon.ANSWER, longest // 2)


def test_with_blocks_for_it_every_sequence_is_there_and_without_one_is() -> None:
    limits = msgspec.structs.replace(LIMITS, max_sequences=32, max_step_tokens=512, max_model_len=8192)
    lengths, _ = full_daemon.contexts(limits, 2912, 8192)
    assert len(lengths) == 32 and set(lengths[1:]) == {77 * 16, 78 * 16}
    assert full_daemon.contexts(limits, 513, 256)[0] == [256] * 32
    assert full_daemon.contexts(limits, 512, 8192)[0] == [8192]


def test_a_daemon_that_does_not_fill_is_an_error(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, RESIDENT)
    monkeypatch.setattr(full_daemon, "START_S", 0.01)
    with pytest.raises(EngineError, match=f"has loaded experts of {RESIDENT} bytes .* fewer than fit"):
        full_daemon.fill(store, LIMITS, {}, kv_blocks=9)
