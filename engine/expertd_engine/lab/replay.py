"""Replays events through a cache of whole slots under any ranking, as the residency ledger would hold it. numpy alone.

Loads take no time and slots are of one size; otherwise what is met is what the ledger meets: leases are asked for a
window at a time, what is leased stays, prompts do not refresh the decode set. Ten times as quick as the ledger, and
compared with it by a test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.accounting import MIN_WINDOW, WINDOW_SHARE
from expertd_engine.lab.events import Events
from expertd_engine.lab.rankings import Ranking
from expertd_engine.lab.trace import Ids

_PROBATION = 2.0**53
"""Below every rank, when subtracted from it: those on probation go first."""
_UNRANKED = -(2.0**40)
"""Instead of no weight at all; what is least recently used is below that still."""


@dataclass(slots=True)
class Met:
    """What the counted events met."""

    lookups: int = 0
    misses: int = 0
    events: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of lookups; 1 where there were none."""
        return 1 - self.misses / self.lookups if self.lookups else 1.0


class CacheReplay:
    """A cache of `slots` experts of `total`, empty at first. Raises ValueError for less than two slots."""

    def __init__(self, total: int, slots: int, ranking: Ranking) -> None:
        if slots < 2:
            raise ValueError(f"{slots} slots are not enough to replay: give at least 2")
        self._slots = slots
        self._window = max(MIN_WINDOW, slots // WINDOW_SHARE)
        self._ranking = ranking
        self._resident = np.zeros(total, bool)
        self._held = 0
        self._keys = np.full(total, np.inf)
        """Of those that may give way, in order; infinite for all others."""
        self._probation = np.zeros(total, bool)
        self._last_use = np.full(total, -1, np.int64)
        """Of what prompts alone have used: the rest has a rank."""
        self._has_scanned = False
        """Whether any prompt was met yet; before, ranks are all there is."""
        self._lookups = 0

    def event(self, number: int, experts: Ids, scan: NDArray[np.bool_] | None) -> int:
        """One layer of one step asks for these distinct `experts`; how many were missing. `scan`: None for none."""
        if len(experts) <= self._window:
            missing = self._lease(number, experts, scan, 0)
        else:
            missing = 0
            for i in range(0, len(experts), self._window):
                part = slice(i, i + self._window)
                missing += self._lease(number, experts[part], None if scan is None else scan[part], i)
        return missing

    def _lease(self, number: int, experts: Ids, scan: NDArray[np.bool_] | None, offset: int) -> int:
        self._use(number, experts, scan, offset)
        keys, resident = self._keys, self._resident
        keys[experts] = np.inf
        changed = self._ranking.changed
        if changed is not None:  # ranks beside those of the event's own experts
            idle = changed[np.isfinite(keys[changed])]
            keys[idle] = self._key(idle)
        missing = experts[~resident[experts]]
        surplus = self._held + len(missing) - self._slots
        if surplus > 0:
            gone = keys.argmin() if surplus == 1 else np.argpartition(keys, surplus - 1)[:surplus]
            resident[gone] = False
            keys[gone] = np.inf
        self._held += len(missing) - max(0, surplus)
        resident[missing] = True
        keys[experts] = self._key(experts)
        return len(missing)

    def _use(self, number: int, experts: Ids, scan: NDArray[np.bool_] | None, offset: int) -> None:
        """As `experts.foresight` has it: law 5."""
        begin = self._lookups + 1
        self._lookups += len(experts)
        at = np.arange(begin, begin + len(experts))
        if scan is None or not scan.any():
            if self._has_scanned:
                self._probation[experts] = False
            self._ranking.used(number, experts, at, offset)
            return
        self._has_scanned = True
        plain = ~scan
        counted = plain | ~self._resident[experts] | self._probation[experts]
        self._probation[experts[counted]] = scan[counted]
        self._last_use[experts[counted]] = at[counted]
        self._ranking.used(number, experts[plain], at[plain], np.flatnonzero(plain) + offset)

    def _key(self, experts: Ids) -> NDArray[np.float64]:
        ranks = self._ranking.ranks[experts]
        if not self._has_scanned:
            return ranks
        ranks = np.where(np.isneginf(ranks), _UNRANKED + self._last_use[experts], ranks)
        return np.where(self._probation[experts], ranks - _PROBATION, ranks)


def replay(events: Events, slots: int, ranking: Ranking, warm: int = 0) -> Met:
    """All events from an empty cache; the first `warm` are not counted."""
    cache, met = CacheReplay(events.total, slots, ranking), Met()
    experts, scanned = events.experts, bool(events.scan.any())
    for number, (begin, end) in enumerate(events):
        missing = cache.event(number, experts[begin:end], events.scan[begin:end] if scanned else None)
        if number >= warm:
            met.events += 1
            met.lookups += end - begin
            met.misses += missing
    return met
