"""Stores whose index lies, with an identity that fits the lie: each is refused with a StoreError, or is sound."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from expertd_engine.errors import StoreError
from expertd_engine.experts.store import ExpertStore, identify
from expertd_engine.experts.store_format import INDEX_NAME, StoreIndex
from fuzz.mutate import garbled, mutated


def index_of(store: Path, rng: Random) -> bytes:
    """The index with something wrong: in its bytes, in its structure, or in its structure with a fresh identity."""
    content = (store / INDEX_NAME).read_bytes()
    kind = rng.randrange(6)
    if kind == 0:
        return garbled(content, rng)
    index: Any = mutated(json.loads(content), rng)
    if kind > 1:
        try:
            typed = msgspec.convert(index, StoreIndex)
            index["store_id"] = identify(typed)
        except msgspec.ValidationError:
            pass
    return json.dumps(index).encode()


def try_store(seed: int, store: Path) -> bool:
    """Open, verify and describe a store with a mutated index: whether it passed. Anything but a StoreError, or a store
    that passes and is not sound, is a finding."""
    rng = Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for path in store.iterdir():
            if path.name != INDEX_NAME:
                Path(folder, path.name).symlink_to(path)
        Path(folder, INDEX_NAME).write_bytes(index_of(store, rng))
        try:
            opened = ExpertStore.open(Path(folder))
            opened.verify()
        except StoreError:
            return False
        sound(opened)
        return True


def sound(store: ExpertStore) -> None:
    """What an opened store promises to whoever computes with it."""
    index = store.index
    for layer, entry in enumerate(index.layers):
        layout = index.layouts[entry.layout]
        assert index.record_bytes(layer) % 4096 == 0 and len(entry.crc32) == entry.num_experts > 0
        for tensor in layout.tensors:
            assert tensor.offset >= 0 and min(tensor.shape) > 0
    assert index.top_k >= 1


def copy_of(store: Path, folder: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(store, folder))
