"""A trace as the expert cache meets it: one event for each layer of each step, all its experts at once. numpy alone.

Replaying access after access would let an expert be evicted by a neighbour in the very event that uses it, and flatters
some policies by a quarter of their misses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from expertd_engine.lab.trace import Bools, Ids, Trace

NEVER = np.int64(2**52)
"""A next use that does not come."""


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """Lookups, ascending within each event; event i is `bounds[i]:bounds[i + 1]`.

    Experts are numbered flat: layer × width + expert.
    """

    experts: Ids
    scan: Bools
    """Prompt tokens alone asked."""
    bounds: Ids
    positions: Ids
    """Of each event's beginning, as the engine counts them (`experts.events`), from step 0 on."""
    tokens: Ids
    """Of each event: the first row of its step, in the trace."""
    width: int
    layers: int
    top_k: int

    @property
    def total(self) -> int:
        """Experts of the model, were every layer as wide as the widest."""
        return self.width * self.layers

    @property
    def lookups_per_token(self) -> int:
        return self.layers * self.top_k

    def next_uses(self) -> Ids:
        """For each lookup the number of the event that uses its expert next; `NEVER` where none does."""
        order = np.lexsort((np.arange(len(self.experts)), self.experts))
        event = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        sorted_experts, sorted_events = self.experts[order], event[order]
        following = np.full(len(order), NEVER)
        same = sorted_experts[1:] == sorted_experts[:-1]
        following[:-1][same] = sorted_events[1:][same]
        found = np.empty_like(following)
        found[order] = following
        return found

    def __iter__(self) -> Iterator[tuple[int, int]]:
        edges = self.bounds.tolist()
        return pairwise(edges)


def events_of(trace: Trace) -> Events:
    """The events of a trace's steps, in order. What was not recorded between two steps is as if it had not been."""
    header = trace.header
    layers, width = len(header.experts), header.width
    begins = np.flatnonzero(np.r_[True, trace.steps[1:] != trace.steps[:-1]]) if len(trace) else np.zeros(0, np.int64)
    step = np.zeros(len(trace), np.int64)
    step[begins[1:]] = 1
    step = np.cumsum(step)
    flat = (step[:, None, None] * layers + np.arange(layers)[:, None]) * width + trace.routes
    every = flat.ravel()
    if (every[1:] <= every[:-1]).any():  # steps of several rows, which share experts
        every = np.unique(flat)
    scan = np.zeros(len(every), bool)
    if not trace.decode.all():
        scan = np.isin(every, np.unique(flat[trace.decode]), assume_unique=True, invert=True)
    event = every // width
    bounds = np.flatnonzero(np.r_[True, event[1:] != event[:-1], True]) if len(every) else np.zeros(1, np.int64)
    numbers = event[bounds[:-1]]
    return Events(
        experts=every % (layers * width),
        scan=scan,
        bounds=bounds,
        positions=numbers * width,
        tokens=begins[numbers // layers] if len(begins) else begins,
        width=width,
        layers=layers,
        top_k=header.top_k,
    )
