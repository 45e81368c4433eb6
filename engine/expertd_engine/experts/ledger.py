"""The residency ledger: which expert is in which slot, who holds it, and what is on its way. A pure state machine.

Owner: the engine thread; whoever carries out the instructions owns nothing. Laws (numbered as in error messages):

1. charged bytes ≤ limit at every instant, between two instructions too; the limit is the budget, or, after the budget
   was lowered below what leases hold, what is still charged: it falls as they end, and meanwhile no load is issued
   but the second try of a failed one, in its own slot, and one for the first demand in line, within the old limit,
   where it would otherwise wait for ever. Charged are, for each slot, the most bytes written since it was last
   dropped; between events that is the sum of the records resident, loading and doomed.
2. A leased expert is never evicted.
3. One owner for each slot, at most one load in flight for each expert, and a lease ends once.
4. Demands overtake prefetches. A prefetch is issued only while no demand waits and is given up when a demand needs its
   room; it evicts only an expert with no known use up to the prefetched one's. (Were *all* that the current and the
   next step need protected, a model whose every step uses every expert could never prefetch: there, the order of
   the uses inside a step is what is worth knowing.)
5. Experts brought in by prompt tokens alone are the first to go, and such uses do not refresh the others' recency; a
   use by a decoding token takes an expert into the working set.
6. The counters equal the ledger.

Demands that cannot be placed wait in the order they were asked. A later demand that would take the last room for the
first in line (of an idle resident, or of a prefetch under way, when records differ in length) waits behind it, so a
consumer that uses and releases its leases in the order it asked for them always comes to an end. Every operation is
O(log n) amortised, but `Tick` (once a step), `check` and `residents_by_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from expertd_engine.experts.accounting import LedgerError, StallCause
from expertd_engine.experts.events import (
    Abort,
    Cancelled,
    Demand,
    Denied,
    Event,
    Exchange,
    ExpertId,
    Failed,
    Instruction,
    Loaded,
    LookupResult,
    Predict,
    Priority,
    Release,
    Remember,
    Served,
    SetBudget,
    Tick,
    Used,
)
from expertd_engine.experts.ledger_base import LedgerBase
from expertd_engine.experts.policy import Policy, Victims
from expertd_engine.experts.residency import Record, State
from expertd_engine.experts.room import Room

__all__ = ["ATTEMPTS", "Ledger", "LedgerError", "State"]

ATTEMPTS = 2
"""Loads tried for a demanded record before its leases are denied."""


class Ledger(LedgerBase):
    """Takes events, returns the instructions to carry out, in order.

    `record_bytes[l]` is the length in bytes of a record of MoE layer l, which has `experts_per_layer[l]` experts.
    `budget_bytes` may later be set anywhere from `minimum_bytes` to `max_budget_bytes` (default: `budget_bytes`), for
    which `num_slots` slots are enough. At most `prefetch_depth` prefetches are in flight; without `prefetch`, hints
    only tell the policy about next uses. `victims`: who orders those that may give way, where that is not a heap of the
    policy's ranks. Raises BudgetError for a budget below the minimum.
    """

    def __init__(
        self,
        record_bytes: Sequence[int],
        experts_per_layer: Sequence[int],
        budget_bytes: int,
        policy: Policy,
        max_budget_bytes: int | None = None,
        prefetch: bool = True,
        prefetch_depth: int = 4,
        victims: Victims | None = None,
    ) -> None:
        layers = list(zip(record_bytes, experts_per_layer, strict=True))
        if not layers or min(record_bytes) < 1 or min(experts_per_layer) < 1 or prefetch_depth < 1:
            raise ValueError(f"no ledger for layers of (bytes, experts) {layers} and prefetch depth {prefetch_depth}")
        super().__init__(
            record_bytes, experts_per_layer, policy, victims,
            minimum_bytes=min(2 * max(record_bytes), sum(nbytes * count for nbytes, count in layers)),
            budget_bytes=budget_bytes, max_budget_bytes=max_budget_bytes, prefetch=prefetch,
            prefetch_depth=prefetch_depth,
        )  # fmt: skip
        self._slots = self._residency.slots
        self._largest = max(record_bytes)
        self._room = Room(self._residency, self._foresight, self.budget_bytes, prefetch_depth)
        self._leases: dict[int, Record] = {}
        self._handlers: dict[type, Callable[[Any], None]] = {
            Demand: self._demand, Used: self._used, Served: self._served, Predict: self._predict,
            Loaded: self._loaded, Failed: self._failed, Cancelled: self._cancelled, Release: self._release,
            Abort: self._abort, Exchange: self._exchange, SetBudget: self._set_budget, Tick: self._tick,
            Remember: self._remember,
        }  # fmt: skip

    def handle(self, event: Event) -> list[Instruction]:
        """Take in one event. Raises LedgerError for one that cannot be, BudgetError or ResourceError for a budget
        outside the allowed range; then nothing has changed.
        """
        return self.handle_all((event,))

    def handle_all(self, events: Iterable[Event]) -> list[Instruction]:
        """Take in events that come together, such as a layer's demands: room is sought once, after the last of them.

        Raises as `handle`; the events before the offending one have then been taken in.
        """
        out = self._residency.out = []
        for event in events:
            self._handlers[type(event)](event)
        room = self._room
        if room.cap != self.budget_bytes:
            room.follow(self.budget_bytes)
        if self._slots.occupied > room.cap:
            room.shrink()
        if room.line:
            room.serve_waiting()
        if not room.line:
            room.start_prefetches()
            room.refill()
        self._slots.drop_vacated(out)
        return out

    # ------------------------------------------------------------ queries

    @property
    def num_slots(self) -> int:
        """Slots that the slab's address range needs, each as long as the longest record."""
        return self._residency.num_slots

    @property
    def victims(self) -> Victims:
        """The experts that may give way, in their order."""
        return self._residency.victims

    @property
    def limit_bytes(self) -> int:
        """What charged bytes may not exceed now (law 1)."""
        return max(self._room.cap, self._slots.charged)

    def stall_cause(self) -> StallCause:
        """What a step that has to wait now is waiting for."""
        loads = self._residency.loads.values()
        read = any(record.leases and record.place is State.LOADING and not record.queued for record in loads)
        return "disk_read" if read else "expert_wait"

    @property
    def is_refilling(self) -> bool:
        """Whether experts of an earlier engine are still to be loaded or on their way."""
        return bool(self._room.remembered or self._residency.prefetching)

    def check(self) -> None:
        """As `LedgerBase.check`, and that leases and the line of demands are those of the records."""
        super().check()
        records = self._residency.records.values()
        if [r for r in records if r.queued] != sorted(self._room.line.values(), key=lambda r: r.expert):
            raise self._residency.story.error(f"law 3: the line {list(self._room.line)} is not who waits in it")
        asked = {lease_id: record for record in records for lease_id in record.leases}
        if asked != self._leases or any(not record.leases for record in self._room.line.values()):
            raise self._residency.story.error(f"law 3: leases {self._leases.keys()} but records have {asked.keys()}")

    # ------------------------------------------------------------ events

    def _demand(self, event: Demand) -> None:
        record = self._asked_for(event.expert, event.lease_id)
        self._leases[event.lease_id] = record
        record.leases[event.lease_id] = None
        self._residency.story.tell(record.expert, "demanded by lease", event.lease_id)
        if event.pairs:
            foreseen = record.facts.next_use is not None and record.facts.next_use <= event.position
            self._foresight.use(record, event)
            self._count_lookup(record, event.pairs, foreseen)
        elif record.place in (State.RESIDENT, State.LOADING):
            self._residency.settle_prefetch(record, "used" if record.place is State.RESIDENT else "late")
        if record.queued:
            return
        if self._room.must_wait(record):
            self._room.join(record)
        else:
            self._room.hold(record, (event.lease_id,))

    def _used(self, event: Used) -> None:
        victims = self._residency.victims
        for index, pairs in zip(event.experts, event.pairs, strict=True):
            record = self._residency.record(ExpertId(event.layer, index))
            if record.place not in (State.RESIDENT, State.LEASED):
                raise self._residency.story.error("law 2: was used in passing, but is not resident", record.expert)
            position = event.position + index
            next_use = record.facts.next_use
            self._foresight.use_resident(record, position)
            self._count_lookup(record, pairs, next_use is not None and next_use <= position)
            if record.facts.ticket:  # what was known of it may be past
                (victims.rose if next_use is None else victims.offer)(record.facts)

    def _served(self, event: Served) -> None:
        hits, activations = self.counters.hits, self.counters.activations["hit"]
        for layer, lookups, pairs in event.layers:
            hits[layer] += lookups
            activations[layer] += pairs
            self._foresight.lookups += lookups

    def _predict(self, event: Predict) -> None:
        records = [self._residency.record(hint.expert) for hint in event.hints]
        for record, hint in zip(records, event.hints, strict=True):
            self._foresight.foresee(record, hint.needed_at)

    def _loaded(self, event: Loaded) -> None:
        record = self._residency.end_load(event.load_id)
        self.counters.count_load(record.priority, record.nbytes)
        if record.place is State.DOOMED and not self._room.may_revive(record):
            self._residency.settle_prefetch(record, "wasted")
            self._residency.vacate(record)
            return
        if record.place is State.DOOMED:
            self._residency.settle_prefetch(record, "late")
        record.failures = 0
        self._residency.arrive(record)
        if record.state is State.LEASED:
            self._room.grant(record, record.leases)

    def _failed(self, event: Failed) -> None:
        record = self._residency.end_load(event.load_id)
        self.counters.load_failures += 1
        self._residency.settle_prefetch(record, "wasted")
        record.failures += bool(record.leases)
        held = record.place is State.LOADING and record.leases and not record.queued
        if held and record.failures < ATTEMPTS:
            # In the slot it has: above a lowered budget there may be no other.
            self._residency.issue_load(record, Priority.DEMAND)
            return
        self._residency.vacate(record)
        if record.failures >= ATTEMPTS:
            self._deny(record, event.reason)

    def _cancelled(self, event: Cancelled) -> None:
        record = self._residency.loads.get(event.load_id)
        if record is not None and record.place is not State.DOOMED:
            raise self._residency.story.error(f"law 3: load {event.load_id} was cancelled unasked", record.expert)
        record = self._residency.end_load(event.load_id)
        self._residency.settle_prefetch(record, "cancelled")
        self._residency.vacate(record)

    def _release(self, event: Release) -> None:
        record = self._leases.get(event.lease_id)
        if record is None:
            raise self._residency.story.error(f"law 3: lease {event.lease_id} is released, but has ended or never was")
        if record.state is not State.LEASED:
            raise self._residency.story.error(
                f"law 3: lease {event.lease_id} is released before it was granted", record.expert
            )
        self._end_lease(event.lease_id, "released by lease")

    def _exchange(self, event: Exchange) -> None:
        leaves, comes = self._leases.get(event.released), self._asked_for(event.expert, event.lease_id)
        if leaves is None or not self._takes_the_slot(comes, leaves):
            self._release(Release(event.released))
            self._demand(Demand(event.lease_id, event.expert, self._foresight.position, pairs=0))
            return
        del self._leases[event.released], leaves.leases[event.released]
        leaves.failures = 0
        self._leases[event.lease_id] = comes
        comes.leases[event.lease_id] = None
        self._residency.give_slot(leaves, comes)

    def _takes_the_slot(self, comes: Record, leaves: Record) -> bool:
        """Whether nobody else uses or waits for what leaves, and there is no room beside it, nor many idle experts, of
        whom one may be worth less."""
        if self._residency.idle_bytes > 2 * self._largest:  # more than what swaps pass through
            return False
        room, slots = self._room, self._slots
        alone = leaves.state is State.LEASED and len(leaves.leases) == 1
        fits = comes.place is State.ABSENT and not comes.leases and comes.nbytes == leaves.nbytes
        is_full = room.cap == self.budget_bytes and slots.occupied <= room.cap < slots.occupied + comes.nbytes
        return alone and fits and is_full and not room.line

    def _abort(self, event: Abort) -> None:
        ended = [lease_id for lease_id in event.lease_ids if lease_id not in self._leases]
        if ended or len(set(event.lease_ids)) < len(event.lease_ids):
            raise self._residency.story.error(
                f"law 3: leases {event.lease_ids} are aborted, but {ended} have ended, or one is named twice"
            )
        for lease_id in event.lease_ids:
            self._end_lease(lease_id, "aborted by lease")

    def _set_budget(self, event: SetBudget) -> None:
        self.budget_bytes = self._checked_budget(event.budget_bytes)

    def _tick(self, event: Tick) -> None:
        self._foresight.advance(event.position)
        self._adapt(self.budget_bytes // self._largest)

    def _remember(self, event: Remember) -> None:
        self._recall_uses(event)
        self._room.remembered = [self._residency.record(expert) for expert in reversed(event.residents)]

    # ------------------------------------------------------------ leases

    def _asked_for(self, expert: ExpertId, lease_id: int) -> Record:
        """The record that a new lease is asked for."""
        record = self._residency.record(expert)
        if lease_id in self._leases:
            raise self._residency.story.error(f"law 3: lease {lease_id} is asked for twice", expert)
        return record

    def _count_lookup(self, record: Record, pairs: int, foreseen: bool) -> None:
        if record.place is State.RESIDENT:
            result: LookupResult = "hit"
            self._residency.settle_prefetch(record, "used")
        elif record.place is State.LOADING:
            result = "late"
            self._residency.settle_prefetch(record, "late")
        else:
            result = "miss"
        self.counters.count_lookup(record.expert.layer, result, pairs, foreseen)

    def _deny(self, record: Record, reason: str) -> None:
        for lease_id in record.leases:
            del self._leases[lease_id]
            self._residency.out.append(Denied(lease_id, record.expert, reason))
        record.leases.clear()
        record.failures = 0
        if record.queued:
            self._room.leave(record)

    def _end_lease(self, lease_id: int, told: str) -> None:
        record = self._leases.pop(lease_id)
        self._residency.story.tell(record.expert, told, lease_id)
        del record.leases[lease_id]
        if record.leases:
            return
        record.failures = 0
        if record.queued:
            self._room.leave(record)
        elif record.place is State.RESIDENT:
            self._residency.set_idle(record)
        else:
            self._residency.doom(record)
