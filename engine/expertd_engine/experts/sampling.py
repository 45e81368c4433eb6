"""Which experts stand for all where following every one would cost too much. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Sequence


def sampled_experts(experts: Sequence[int], most: int) -> list[tuple[int, int]]:
    """At most so many (layer, expert), chosen by hash, of a model with `experts` in each layer."""
    everyone = [(layer, expert) for layer, count in enumerate(experts) for expert in range(count)]
    return sorted(everyone, key=lambda one: zlib.crc32(f"{one[0]}/{one[1]}".encode()))[:most]
