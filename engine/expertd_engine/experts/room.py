"""Who gets room, and who gives way for it: the line of demands, what is prefetched along hints, and a budget that
changes. Pure; the ledger has the laws that all this keeps, and their numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from expertd_engine.experts.events import ExpertId, Granted, Priority
from expertd_engine.experts.foresight import Foresight
from expertd_engine.experts.policy import Facts
from expertd_engine.experts.residency import Record, Residency, State


class Room:
    """Of one ledger's slots. At most `prefetch_depth` prefetches are in flight."""

    def __init__(self, residency: Residency, foresight: Foresight, budget_bytes: int, prefetch_depth: int) -> None:
        self._residency = residency
        self._slots = residency.slots
        self._foresight = foresight
        self._depth = prefetch_depth
        self.cap = budget_bytes
        """What loads may fill: the budget, unless it was lowered while demands wait."""
        self.line: OrderedDict[ExpertId, Record] = OrderedDict()
        """Records whose demands wait for room, in the order they were asked for."""
        self.remembered: list[Record] = []
        """Of an earlier engine: to be loaded where there is room, the last one first."""

    def must_wait(self, record: Record) -> bool:
        """Whether a new demand has to wait in line: for its own room, or lest the first in line never gets any."""
        if record.place is State.ABSENT or record.place is State.DOOMED:
            return True
        if not self.line or len(record.leases) > 1:
            return False
        first = next(iter(self.line.values()))
        return self._residency.held_bytes() + record.nbytes + first.nbytes > self.cap

    def join(self, record: Record) -> None:
        """To the end of the line."""
        record.queued = True
        self.line[record.expert] = record

    def leave(self, record: Record) -> None:
        record.queued = False
        del self.line[record.expert]

    def hold(self, record: Record, lease_ids: Iterable[int]) -> None:
        """Give the leases a resident record, or let them wait for one that is loading."""
        if record.place is State.RESIDENT:
            self._residency.set_leased(record)
            self.grant(record, lease_ids)
        else:
            self._residency.promote(record)

    def grant(self, record: Record, lease_ids: Iterable[int]) -> None:
        """Tell of leases that begin: the record is in its slot."""
        for lease_id in lease_ids:
            self._residency.story.tell(record.expert, "granted to lease", lease_id)
            self._residency.out.append(Granted(lease_id, record.expert, record.slot))

    def serve_waiting(self) -> None:
        """Serve the line of demands from its head; stop at the first that has to wait on."""
        while self.line:
            record = next(iter(self.line.values()))
            if record.place is State.DOOMED or (record.place is State.ABSENT and not self._make_room(record.nbytes)):
                return
            self.leave(record)
            if record.place is State.ABSENT:
                self._residency.load(record, Priority.DEMAND, self.cap)
            else:
                self.hold(record, record.leases)

    def _make_room(self, nbytes: int) -> bool:
        """Evict for a demand. Where that is not enough but giving up prefetches would be, give up just enough."""
        residency = self._residency
        missing = self._slots.occupied - residency.idle_bytes + nbytes - self.cap
        if missing <= 0:
            while self._slots.occupied + nbytes > self.cap:
                residency.evict(residency.victims.take(), "capacity")
            return True
        if missing - residency.doomed_bytes <= residency.prefetching_bytes:
            residency.doom_prefetches(missing - residency.doomed_bytes)
        return False

    def start_prefetches(self) -> None:
        """Prefetch along the hints, soonest first; stop at the first for which there is no room."""
        while len(self._residency.prefetching) < self._depth:
            foreseen = self._foresight.soonest()
            if foreseen is None:
                return
            needed_at, record = foreseen
            if not self._make_room_by(needed_at, record.nbytes):
                return
            self._residency.load(record, Priority.PREFETCH, self.cap)
            self._foresight.prefetched(record)

    def refill(self) -> None:
        """Load what an earlier engine held, best first, while there is room that nobody asks for."""
        while self.remembered and len(self._residency.prefetching) < self._depth:
            record = self.remembered.pop()
            if self._slots.occupied + record.nbytes > self.cap:
                self.remembered.clear()
            elif record.place is State.ABSENT:
                self._residency.fill(record, self.cap, Priority.PREFETCH)

    def _make_room_by(self, needed_at: int, nbytes: int) -> bool:
        """Evict for a prefetch, but only what is not known to be needed by then (law 4)."""
        residency = self._residency
        short = self._slots.occupied + nbytes - self.cap
        if short > residency.idle_bytes:
            return False
        victims: list[Facts] = []
        while short > 0:
            facts = residency.victims.take_needed_after(needed_at)
            if facts is None:
                for spared in victims:
                    residency.victims.offer(spared)
                return False
            victims.append(facts)
            short -= residency.records[facts.expert].nbytes
        for facts in victims:
            residency.evict(facts, "capacity")
        return True

    def follow(self, budget_bytes: int) -> None:
        """Take a changed budget as the limit; a lowered one only as far as the first demand in line can still load.

        Leases asked for after it may hold all that the lowered budget leaves, and their consumer waits for it first.
        """
        first = next(iter(self.line.values()), None)
        needed = self._residency.held_bytes() + first.nbytes if first else 0
        self.cap = max(budget_bytes, min(self.cap, needed))

    def shrink(self) -> None:
        """Come down to a lowered budget as far as leases and demanded loads allow."""
        residency = self._residency
        while self._slots.occupied > self.cap and len(residency.victims):
            residency.evict(residency.victims.take(), "budget_change")
        residency.doom_prefetches(self._slots.occupied - residency.doomed_bytes - self.cap)

    def may_revive(self, record: Record) -> bool:
        """A doomed record that was loaded after all may stay if it is what the first demand in line waits for."""
        return next(iter(self.line.values()), None) is record and self._slots.occupied <= self.cap
