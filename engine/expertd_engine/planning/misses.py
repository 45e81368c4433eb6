"""Where experts that a card's step misses are computed: on the card, which reads them over its link, or by the
processor, from the same records. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expertd_engine.config import DeviceMisses
from expertd_engine.errors import ConfigError

Where = Literal["link", "cpu"]


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
    if asked == "cpu" and obstacle is not None:
        raise ConfigError(f"device_misses: 'cpu' is not allowed here: {obstacle}; give link, or auto")
    return asked != "link" and obstacle is None


def decide(asked: DeviceMisses, obstacle: str | None, link_bytes_per_s: float, cpu_bytes_per_s: float = 0.0) -> Misses:
    """`auto` takes whoever goes through a record sooner. `cpu_bytes_per_s` is measured where `may_compute` says so."""
    if asked == "auto" and obstacle is not None:
        return Misses("link", link_bytes_per_s, fallback=f"missing experts are read over the link: {obstacle}")
    faster: Where = "cpu" if cpu_bytes_per_s > link_bytes_per_s else "link"
    return Misses(faster if asked == "auto" else asked, link_bytes_per_s, cpu_bytes_per_s)
