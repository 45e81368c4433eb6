"""Makes of what a launch reported what the ledger is told of it, and what the step's requests are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.device_events import COMPUTED, HIT, LANDED, READ, SHARED, WAITED, Landed, Met, Seen
from expertd_engine.experts.device_streams import Mark
from expertd_engine.experts.device_table import Report
from expertd_engine.experts.events import ExpertId
from expertd_engine.sequence_stats import ExpertCounts

SharedBytes = Callable[[int, int], int]
"""Of the expert that the processor computed a part of, the bytes that crossed the link; by layer and first neuron of
that part, which stands where others have a slot."""
_MISSING = (READ, LANDED, COMPUTED, SHARED)
_SOURCES = SHARED + 1


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch and where its report will be. Its first layer's experts are used from `position` on, each layer's
    `experts` further. Not `whole`: it failed.
    """

    step: int
    position: int
    experts: int
    turn: int
    scan: bool
    whole: bool
    ended: Mark
    known: NDArray[np.int64]
    """The numbers of its experts (`device_events.Fetch`), where all were known when it began; else none."""


def read_report(report: Report, launch: Launch, shared_bytes: SharedBytes) -> Iterator[tuple[Seen, list[Landed]]]:
    """Layer by layer: which experts were met, and those that landed."""
    for layer, (experts, sources, slots, pairs) in report.layers():
        position = launch.position + layer * launch.experts
        landed = (
            [
                Landed(ExpertId(layer, expert), slot, launch.scan, launch.whole)
                for expert, source, slot in zip(experts, sources, slots, strict=True)
                if source == LANDED
            ]
            if LANDED in sources
            else []
        )
        shared = shared_bytes(layer, slots[sources.index(SHARED)]) if SHARED in sources else 0
        yield Seen(layer, experts, sources, pairs, position, launch.scan, shared), landed


def read_at_once(report: Report, launch: Launch, first: NDArray[np.int64]) -> Met | None:
    """All that was met; None where there is more to tell of it. `first`: the number of each layer's first expert."""
    layers, rows = np.nonzero(_is_met(report, report.seen.shape[1]))
    experts, sources, _, pairs = report.seen[layers, rows].T.astype(np.int64)
    if not len(layers) or launch.scan or max(READ, WAITED) < sources.max():
        return None
    return Met(layers, first[layers] + experts, sources, pairs, launch.position, launch.experts)


def count_report(
    report: Report, record_bytes: Sequence[int], link_bytes_per_s: float, shared_bytes: SharedBytes,
    computed_s: float = 0.0,
) -> ExpertCounts:  # fmt: skip
    """Lookups by result; the time that the link took is estimated, since nobody can look at the clock in a kernel.
    `computed_s`: what the processor took for those left to it, whose bytes stay where they are."""
    counts = report.counts.tolist()
    rows = max(counts)
    sources = report.seen[:, :rows, 1]
    if not sources.any():  # what lies behind a layer's last row, of steps before, is of no account then
        return ExpertCounts(sum(counts), 0, 0, 0, computed_s)
    met = sources if min(counts) == rows else sources[_is_met(report, rows)]
    told = met.astype(np.int8).tobytes()
    totals = [told.count(source) for source in range(_SOURCES)]
    nbytes = start = 0
    if totals[READ] or totals[LANDED] or totals[SHARED]:  # else nothing crossed
        for layer, count in enumerate(counts):
            here = told[start : start + count]
            start += count
            nbytes += (here.count(READ) + here.count(LANDED)) * record_bytes[layer]
            if (shared := here.find(SHARED)) >= 0:
                nbytes += shared_bytes(layer, int(report.seen[layer, shared, 2]))
    missing = sum(totals[source] for source in _MISSING)
    # Of a copy that was waited for, half was under way already: nobody knows better.
    stall_s = (nbytes + totals[WAITED] * max(record_bytes) / 2) / link_bytes_per_s + computed_s
    return ExpertCounts(totals[HIT], totals[WAITED], missing, nbytes, stall_s)


def _is_met(report: Report, rows: int) -> NDArray[np.bool_]:
    """`[layers, rows]`: those behind are of steps before."""
    return np.arange(rows) < report.counts[:, None]


def num_misses(seen: Seen) -> int:
    """Experts that were read over the link, whole."""
    return seen.sources.count(READ) + seen.sources.count(LANDED)
