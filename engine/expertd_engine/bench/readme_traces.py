"""Arrival traces like conversations: bursts and pauses, second questions that bring the first exchange with them. Pure.

A trace says who asks what and when; answers, and the experts of every token, were recorded once from the model itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Recorded:
    """One exchange: token ids of prompt and answer, and the expert of each token but the last, which needs none."""

    domain: str
    prompt: list[int]
    answer: list[int]
    experts: list[int]

    def to_json(self) -> dict[str, Any]:
        return {"domain": self.domain, "prompt": self.prompt, "answer": self.answer, "experts": self.experts}


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    exchange: Recorded


_BURST = 6
"""Requests in a burst, on average."""
_INSIDE = 0.1
"""Gap inside a burst, in units of the mean gap."""


def make_trace(exchanges: Sequence[Recorded], requests: int, per_second: float, seed: int) -> list[Arrival]:
    """`requests` arrivals, on average `per_second`, in bursts: a short gap inside a burst, a long one between two.

    Gaps are exponential, so that a trace as a whole has the mean asked for; exchanges are drawn evenly by domain.
    """
    rng = random.Random(seed)
    by_domain: dict[str, list[Recorded]] = {}
    for one in exchanges:
        by_domain.setdefault(one.domain, []).append(one)
    domains = sorted(by_domain)
    ends = 1 / _BURST  # chance that a request is the last of its burst
    between = (1 - (1 - ends) * _INSIDE) / ends
    arrivals: list[Arrival] = []
    now = 0.0
    for _ in range(requests):
        arrivals.append(Arrival(now, rng.choice(by_domain[rng.choice(domains)])))
        gap = between if rng.random() < ends else _INSIDE
        now += rng.expovariate(1.0) * gap / per_second
    return arrivals
