"""What replays of a store's traces recommend, beside the store: `serve --expert-policy auto` does as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from expertd_engine.errors import StoreError

NAME = "policy.json"
VERSION = 1


class Recommendation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The winner among what can be served, and by what evidence."""

    store_id: str
    policy: Literal["lru", "lfu", "next-use", "predicted"]
    half_life_tokens: float | None
    """Of uses, for policies that count them; None: chosen while serving."""
    predictor: Literal["none", "next-gate", "learned"]
    hit_rates: dict[str, dict[str, float]]
    """By budget, then policy."""
    lookups: int
    """Replayed."""
    version: int = VERSION


def write_recommendation(folder: Path, recommendation: Recommendation) -> Path:
    """Raises StoreError where the store cannot be written to."""
    path = folder / NAME
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(recommendation)) + b"\n")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    return path


def read_recommendation(folder: Path, store_id: str) -> Recommendation | None:
    """None where there is none. Raises StoreError for one that is not of this store and version."""
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    try:
        found = msgspec.json.decode(data, type=Recommendation)
    except msgspec.DecodeError as error:
        raise StoreError(f"{path} is no recommendation: {error}; make it again with `expertd replay`") from None
    if (found.store_id, found.version) != (store_id, VERSION):
        raise StoreError(f"{path} is of another store or version: make it again with `expertd replay`, or remove it")
    return found
