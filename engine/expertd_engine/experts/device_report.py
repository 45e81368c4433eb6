"""Makes of what a launch reported what the ledger is told of it, and what the step's requests are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from expertd_engine.experts.device_events import COMPUTED, HIT, LANDED, READ, SHARED, WAITED, Landed, Seen
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


def count_report(
    report: Report, record_bytes: Sequence[int], link_bytes_per_s: float, shared_bytes: SharedBytes,
    computed_s: float = 0.0,
) -> ExpertCounts:  # fmt: skip
    """Lookups by result; the time that the link took is estimated, since nobody can look at the clock in a kernel.
    `computed_s`: what the processor took for those left to it, whose bytes stay where they are."""
    rows, layers = int(report.counts.max()), len(report.counts)
    is_met = np.arange(rows) < report.counts[:, None]  # rows behind are of steps before
    kinds = report.seen[:, :rows, 1] + _SOURCES * np.arange(layers)[:, None]
    counted = np.bincount(kinds[is_met], minlength=_SOURCES * layers)
    by_source = counted.reshape(layers, _SOURCES)
    totals, missing = by_source.sum(axis=0).tolist(), by_source[:, _MISSING].sum(axis=1)
    over_link, shared = by_source[:, READ] + by_source[:, LANDED], by_source[:, SHARED].nonzero()[0].tolist()
    divided = is_met[shared] & (report.seen[shared, :rows, 1] == SHARED)
    cuts = np.where(divided, report.seen[shared, :rows, 2], 0).max(axis=1, initial=0)
    nbytes = int(over_link @ np.array(record_bytes)) + sum(map(shared_bytes, shared, cuts.tolist()))
    # Of a copy that was waited for, half was under way already: nobody knows better.
    stall_s = (nbytes + totals[WAITED] * max(record_bytes) / 2) / link_bytes_per_s + computed_s
    return ExpertCounts(totals[HIT], totals[WAITED], int(missing.sum()), nbytes, stall_s)


def num_misses(seen: Seen) -> int:
    """Experts that were read over the link, whole."""
    return seen.sources.count(READ) + seen.sources.count(LANDED)
