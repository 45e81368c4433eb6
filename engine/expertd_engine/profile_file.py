"""Reads and writes the profile that lies in a store's folder."""

from __future__ import annotations

from pathlib import Path

import msgspec

from expertd_engine.errors import StoreError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.planning.profile import PROFILE_NAME, Profile, decode_profile


def has_profile(store: ExpertStore) -> bool:
    return (store.path / PROFILE_NAME).is_file()


def profile_to_serve(store: ExpertStore, fallbacks: list[str]) -> Profile | None:
    """None where there is none, and a fallback where it is of no use: who serves, or profiles again, can do without."""
    try:
        return read_profile(store) if has_profile(store) else None
    except StoreError as error:
        fallbacks.append(f"plans and virtual mode's split of slots do without the store's profile: {error}")
        return None


def read_profile(store: ExpertStore) -> Profile:
    """Raises StoreError where there is none, or none of this store and version."""
    path = store.path / PROFILE_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StoreError(f"{store.path} has no {PROFILE_NAME}: make one with `expertd profile`") from None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    return decode_profile(data, store.index.store_id)


def write_profile(store: ExpertStore, profile: Profile) -> Path:
    """Raises StoreError where the store cannot be written to."""
    path = store.path / PROFILE_NAME
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(profile)))
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    return path
