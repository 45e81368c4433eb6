"""Plain data with something wrong in it: structure-aware mutation of what JSON and msgpack can hold."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, -(2**31), 2**63 - 1, -(2**63), 0.0, -0.0, 1e308, float("nan"), float("inf"),
    "", "\x00", "..", "/etc/passwd", "x" * 5000, "\ud7ff", [], {}, [[]], [None], {"": None},
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside `value`, itself aside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in items:
        found.append((*path, key))
        found += places(inner, (*path, key))
    return found


def mutated(value: Any, rng: Random) -> Any:
    """A copy of `value` with one to three things changed: replaced, removed, repeated, added, exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        paths = places(value)
        if paths:
            _mutate_at(value, rng.choice(paths), rng)
    return value


def _mutate_at(value: Any, path: tuple[Any, ...], rng: Random) -> None:
    *way, key = path
    for step in way:
        value = value[step]
    kind = rng.randrange(6)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, list):
        value.insert(rng.randrange(len(value) + 1), copy.deepcopy(value[key]))
    elif kind == 2 and isinstance(value, dict):
        value[rng.choice(("type", "extra", "bytes", "offset"))] = rng.choice(ODD)
    elif kind == 3 and isinstance(value[key], (int, float)) and not isinstance(value[key], bool):
        value[key] += rng.choice((1, -1, 4096, -4096, 0.5))
    elif kind == 4:
        others = list(value.values()) if isinstance(value, dict) else value
        value[key] = copy.deepcopy(rng.choice(others))
    else:
        value[key] = copy.deepcopy(rng.choice(ODD))


def garbled(frame: bytes, rng: Random) -> bytes:
    """Some bytes flipped, cut off or added."""
    data = bytearray(frame)
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(3)
        if kind == 0 and data:
            data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 1:
            del data[rng.randrange(len(data) + 1) :]
        else:
            data += rng.randbytes(rng.randrange(1, 8))
    return bytes(data)
