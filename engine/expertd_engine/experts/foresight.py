"""What is known of uses, past and future: kept in each record's facts, and the hints still to be prefetched.

Owner: the ledger. Pure; time is the position of the latest demand or tick.
"""

from __future__ import annotations

from heapq import heappop, heappush

from expertd_engine.experts.events import Demand, ExpertId
from expertd_engine.experts.policy import Policy
from expertd_engine.experts.residency import Record, Residency, State


class Foresight:
    """Takes in uses and hints. Without `prefetch`, hints tell the policy about next uses and nothing else."""

    def __init__(self, residency: Residency, policy: Policy, prefetch: bool) -> None:
        self.position = 0
        self.lookups = 0
        self._residency = residency
        self._policy = policy
        self._prefetch = prefetch
        self._hints: list[tuple[int, ExpertId]] = []  # heap; an entry is void unless the record's `hinted` agrees
        self._known: dict[ExpertId, Record] = {}  # those with a known next use

    def use_resident(self, record: Record, position: int) -> None:
        """A use by decoding tokens of a resident expert, as `use`."""
        facts = record.facts
        self.position = max(self.position, position)
        self.lookups += 1
        self._know(record, position, None)
        facts.probation = False
        facts.last_use = self.lookups
        self._policy.used(facts)

    def use(self, record: Record, event: Demand) -> None:
        """A demand, already among the record's leases. Knows law 5."""
        facts = record.facts
        self.position = max(self.position, event.position)
        self.lookups += 1
        self._know(record, event.position, event.next_use)
        brought_in = len(record.leases) == 1 and (record.pending or record.place in (State.ABSENT, State.DOOMED))
        if event.scan and not brought_in and not facts.probation:
            return  # the working set's recency is decoding's own
        facts.probation = event.scan
        facts.last_use = self.lookups
        if not event.scan:
            self._policy.used(facts)

    def foresee(self, record: Record, needed_at: int) -> None:
        """A hint. It names the soonest known use, or is not kept: it comes again when it is the soonest."""
        facts = record.facts
        if needed_at < self.position:
            return
        if facts.next_use is None or needed_at < facts.next_use:
            facts.next_use = needed_at
            self._known[record.expert] = record
            if facts.ticket:
                self._residency.victims.rose(facts)
        wanted = self._prefetch and record.place is State.ABSENT
        if wanted and needed_at == facts.next_use and needed_at != record.hinted:
            record.hinted = needed_at
            heappush(self._hints, (needed_at, record.expert))

    def soonest(self) -> tuple[int, Record] | None:
        """The soonest foreseen use of an absent record, and the record; None if there is none."""
        while self._hints:
            needed_at, expert = self._hints[0]
            record = self._residency.records[expert]
            if record.hinted == needed_at:
                if record.place is State.ABSENT and record.facts.next_use == needed_at >= self.position:
                    return needed_at, record
                record.hinted = None
            heappop(self._hints)
        return None

    def prefetched(self, record: Record) -> None:
        """The record's load was issued. It counts as used now, or history alone would evict it on arrival."""
        record.hinted = None
        record.facts.probation = False
        record.facts.last_use = self.lookups

    def advance(self, position: int) -> None:
        """Forget uses foreseen before `position`. What was loaded for them alone is given up, or the first to go."""
        self.position = max(self.position, position)
        for expert, record in list(self._known.items()):
            facts = record.facts
            if facts.next_use is not None and facts.next_use < position:
                facts.next_use = None
                del self._known[expert]
                if expert in self._residency.prefetching:
                    self._residency.doom(record)
                facts.probation = facts.probation or record.pending
                if facts.ticket:
                    self._residency.victims.offer(facts)

    def forget_until(self, record: Record, used_at: int) -> None:
        """What was known of uses up to this one is past."""
        self._know(record, used_at, None)

    def _know(self, record: Record, used_at: int, told: int | None) -> None:
        """Of the known uses after this one, the soonest stands."""
        facts = record.facts
        if facts.next_use is None and told is None:
            return
        known = [use for use in (facts.next_use, told) if use is not None and use > used_at]
        facts.next_use = min(known, default=None)
        if facts.next_use is None:
            self._known.pop(record.expert, None)
        else:
            self._known[record.expert] = record
