"""Fixed seeds of the fuzzers; `make fuzz-inputs` and `make fuzz-http` run fresh ones for minutes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import msgspec
import pytest

from expertd_engine.errors import StoreError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import INDEX_NAME
from expertd_engine.messages import ToEngine
from expertd_engine.prepare import prepare
from fuzz.frames import STATUSES, FrameTarget
from fuzz.messages import TO_ENGINE, frame_of, try_engine
from fuzz.stores import index_of, try_store
from support.fake_store import write_store
from support.tiny_mixtral import make_mixtral


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    make_mixtral(folder / "source", num_hidden_layers=2)
    prepare(folder / "source", folder / "store", "float32")
    return folder / "store"


def test_what_is_nearly_a_message_is_refused_or_taken_by_the_engine() -> None:
    taken = [try_engine(seed) for seed in range(500)]
    assert 50 < sum(taken) < 450, "all is refused, or nothing: not nearly a message"


def test_what_is_nearly_a_message_does_not_end_the_server(tmp_path: Path) -> None:
    with FrameTarget.running(write_store(tmp_path)) as server:
        statuses = {server.try_frame(seed) for seed in range(40)}
    assert {200} < statuses <= set(STATUSES), "some frames end an answer, others do not"


def test_what_is_nearly_a_store_is_refused_or_sound(store: Path) -> None:
    passed = [try_store(seed, store) for seed in range(200)]
    assert 0 < sum(passed) < 100, "all is refused, or most is sound: not nearly a store"


def test_the_fuzzers_reach_beyond_the_codecs(store: Path, tmp_path: Path) -> None:
    """A good part of what they make can be decoded: it is the meaning that is wrong."""
    decoded: Counter[str] = Counter()
    for seed in range(200):
        rng = Random(seed)
        try:
            msgspec.msgpack.decode(frame_of(rng.choice(TO_ENGINE), rng), type=ToEngine)
            decoded["message"] += 1
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass
        (tmp_path / INDEX_NAME).write_bytes(index_of(store, Random(seed)))
        try:
            ExpertStore.open(tmp_path)
        except StoreError as error:
            decoded["lie"] += "makes no sense" in str(error) or "store file" in str(error)
    assert decoded["message"] > 20 and decoded["lie"] > 20, decoded
