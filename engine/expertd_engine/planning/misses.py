"""Where experts that a card's step misses are computed: on the card, which reads them over its link, by the processor,
from the same records, or some here and some there at once, of which one may be divided. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from expertd_engine.config import DeviceMisses
from expertd_engine.errors import ConfigError

Where = Literal["link", "cpu", "both"]

LEAST_SHARE = 0.25
"""Of the quicker side's speed: a slower other side is not worth being asked."""
CUT_NEURONS = 64
"""A part of an expert begins at a multiple of it: no format has a group or a word that reaches across."""
LEAST_GAIN = 0.1
"""Of the time in which the link carries one expert: for less none is divided, since what is cannot stay on the card."""


@dataclass(frozen=True, slots=True)
class Misses:
    """What was decided, and by what: bytes of records a second; 0 where that was not measured."""

    where: Where
    link_bytes_per_s: float
    cpu_bytes_per_s: float = 0.0
    cpu_start_s: float = 0.0
    """What a request to the processor takes beyond that."""
    fallback: str | None = None
    """Why the processor was not even tried, though it might have been taken."""


class Split(NamedTuple):
    """Of the experts that a layer misses, what is left to the processor: `whole` of them, and one more's neurons from
    `cut` on, while the link carries those before; 0: none is divided."""

    whole: int = 0
    cut: int = 0


def may_compute(asked: DeviceMisses, obstacle: str | None) -> bool:
    """Whether the processor is to be measured, where `obstacle` says why it cannot compute these experts, if it cannot.

    Raises ConfigError where nothing else is allowed.
    """
    if asked in ("cpu", "both") and obstacle is not None:
        raise ConfigError(f"device_misses: {asked!r} is not allowed here: {obstacle}; give link, or auto")
    return asked != "link" and obstacle is None


def decide(
    asked: DeviceMisses, obstacle: str | None, link_bytes_per_s: float, cpu_bytes_per_s: float = 0.0,
    cpu_start_s: float = 0.0,
) -> Misses:  # fmt: skip
    """`auto` takes both sides where neither is much slower, else the quicker one. The processor is measured where
    `may_compute` says so."""
    if asked == "auto" and obstacle is not None:
        return Misses("link", link_bytes_per_s, fallback=f"missing experts are read over the link: {obstacle}")
    if asked != "auto":
        return Misses(asked, link_bytes_per_s, cpu_bytes_per_s, cpu_start_s)
    slower, faster = sorted((cpu_bytes_per_s, link_bytes_per_s))
    quicker: Where = "cpu" if cpu_bytes_per_s > link_bytes_per_s else "link"
    where: Where = "both" if slower >= LEAST_SHARE * faster else quicker
    return Misses(where, link_bytes_per_s, cpu_bytes_per_s, cpu_start_s)


def left_to_processor(missing: int, decided: Misses, record_bytes: int, inner: int) -> Split:
    """Of so many experts of `inner` neurons that a layer misses: what the processor computes, so that both sides have
    done the soonest. Where both work at least a part is read over the link: a whole one can stay.
    """
    if decided.where != "both":
        return Split(missing if decided.where == "cpu" else 0)
    return _soonest(missing, decided, record_bytes, inner) if missing else Split()


def seconds(missing: int, split: Split, decided: Misses, record_bytes: int, inner: int) -> float:
    """Until both sides have done with so many missing experts, as far as their speeds say."""
    left = split.whole + (1 - split.cut / inner if split.cut else 0.0)
    on_cpu = decided.cpu_start_s + left * record_bytes / decided.cpu_bytes_per_s if left else 0.0
    return max(on_cpu, (missing - left) * record_bytes / decided.link_bytes_per_s)


def _soonest(missing: int, decided: Misses, record_bytes: int, inner: int) -> Split:
    def took(split: Split) -> float:
        return seconds(missing, split, decided, record_bytes, inner)

    on_link, on_cpu = record_bytes / decided.link_bytes_per_s, record_bytes / decided.cpu_bytes_per_s
    even = max(0.0, (missing * on_link - decided.cpu_start_s) / (on_link + on_cpu))  # both sides end at once
    whole = min(int(even), missing - 1)
    undivided = min((Split(), Split(whole), Split(min(whole + 1, missing - 1))), key=took)
    below = int((1 - (even - whole)) * inner) // CUT_NEURONS * CUT_NEURONS
    cuts = [cut for cut in (below, below + CUT_NEURONS) if 0 < cut < inner]
    divided = min((Split(whole, cut) for cut in cuts), key=took, default=undivided)
    return divided if took(divided) < took(undivided) - LEAST_GAIN * on_link else undivided
