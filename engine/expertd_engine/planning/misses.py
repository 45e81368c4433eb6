"""Where experts that a card's step misses are computed: on the card, which reads them over its link, by the processor,
from the same records, or some here and some there at once. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expertd_engine.config import DeviceMisses
from expertd_engine.errors import ConfigError

Where = Literal["link", "cpu", "both"]

LEAST_SHARE = 0.25
"""Of the quicker side's speed: a slower other side is not worth being asked."""


@dataclass(frozen=True, slots=True)
class Misses:
    """What was decided, and by what: bytes of records a second; 0 where that was not measured."""

    where: Where
    link_bytes_per_s: float
    cpu_bytes_per_s: float = 0.0
    fallback: str | None = None
    """Why the processor was not even tried, though it might have been taken."""


def may_compute(asked: DeviceMisses, obstacle: str | None) -> bool:
    """Whether the processor is to be measured, where `obstacle` says why it cannot compute these experts, if it cannot.

    Raises ConfigError where nothing else is allowed.
    """
    if asked in ("cpu", "both") and obstacle is not None:
        raise ConfigError(f"device_misses: {asked!r} is not allowed here: {obstacle}; give link, or auto")
    return asked != "link" and obstacle is None


def decide(asked: DeviceMisses, obstacle: str | None, link_bytes_per_s: float, cpu_bytes_per_s: float = 0.0) -> Misses:
    """`auto` takes both sides where neither is much slower, else the quicker one. `cpu_bytes_per_s` is measured where
    `may_compute` says so."""
    if asked == "auto" and obstacle is not None:
        return Misses("link", link_bytes_per_s, fallback=f"missing experts are read over the link: {obstacle}")
    if asked != "auto":
        return Misses(asked, link_bytes_per_s, cpu_bytes_per_s)
    slower, faster = sorted((cpu_bytes_per_s, link_bytes_per_s))
    quicker: Where = "cpu" if cpu_bytes_per_s > link_bytes_per_s else "link"
    return Misses("both" if slower >= LEAST_SHARE * faster else quicker, link_bytes_per_s, cpu_bytes_per_s)


def left_to_processor(most: int, decided: Misses) -> list[int]:
    """Of n experts that a layer misses, for n from 0 to `most`: how many the processor computes, so that both sides
    have done with theirs the soonest. One alone is read over the link, where it can stay.
    """
    if decided.where != "both":
        return [n if decided.where == "cpu" else 0 for n in range(most + 1)]
    cpu, link = decided.cpu_bytes_per_s, decided.link_bytes_per_s

    def soonest(missing: int) -> int:
        return min(range(missing), key=lambda left: max(left / cpu, (missing - left) / link))

    return [0, 0, *map(soonest, range(2, most + 1))]
