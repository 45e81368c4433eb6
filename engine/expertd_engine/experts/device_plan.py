"""Brings in what a step is known to miss by one plan, and tells of what such steps met in one event. Pure.

Owner: the engine thread, through `DeviceLedger`. A step whose routes are all known when it begins lacks dozens of
experts. One by one, each would cost the host a hint, a search for who gives way, a boundary until its slot has cooled,
and a completion; while the host is busy with that, the link stands still. But by then no launch runs, so that no slot
need cool: who comes, who gives way and where everybody goes is settled at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.device_events import HIT, READ, WAITED, Fetch, Fetched, Fetching, Met, PassOn, Retire
from expertd_engine.experts.device_pool import Use
from expertd_engine.experts.device_slots import SlotLedger
from expertd_engine.experts.device_uses import FETCHED, NOTED
from expertd_engine.experts.events import LookupResult, Priority
from expertd_engine.experts.residency import Record, State

_EMPTY = (Use.COLD, Use.COOLING, Use.FREE)
"""What a copy may be made into while no launch runs."""
_TOGETHER = 16
"""Records whose copies are complete together: telling of so many holds up the look at a running step by little."""
_RESULTS: tuple[tuple[int, LookupResult], ...] = ((HIT, "hit"), (WAITED, "late"), (READ, "miss"))


class PlanningLedger(SlotLedger):
    """Parameters as of `SlotLedger`."""

    def _begin_plans(self) -> None:
        self._records = list(self._residency.records.values())
        """By number."""
        self._notable = np.frombuffer(self._uses.notable, np.int8)
        self._fetching: dict[int, list[Record]] = {}
        """What is copied together."""
        self._last_fetch = -1
        self._used: list[int] = []
        """Uses by decoding tokens that are not told yet, the latest lookups, of layers up to `_used_layer`."""
        self._used_layer = -1

    # ------------------------------------------------------------ before a step

    def _fetch(self, event: Fetch) -> None:
        pool = self.pool
        if event.evict:
            self._recall()  # a step that finds everything lands nothing
        empty = [slot for use in _EMPTY for slot in pool.slots(use) if slot not in event.unready]
        most = len(empty) if event.most is None else min(len(empty), event.most)
        absent = self._absent(event.numbers, None if event.evict else most)
        lacking = len(absent) + event.spare - len(empty) if event.evict else 0
        given_up = self._give_up(lacking, event) if lacking > 0 else []
        passed_on = given_up[: max(0, len(absent) - len(empty))]
        slots = [*empty, *(record.slot for record in passed_on)][: len(absent)]
        for record, slot in zip(absent, empty, strict=False):
            pool.own(slot, record.nbytes)
        for record, victim in zip(absent[len(empty) :], passed_on, strict=False):
            pool.pass_on(victim.slot, record.nbytes)
        for record in given_up[len(passed_on) :]:
            pool.vacate(record.slot)
            self._out.append(Retire(record.slot, record.expert))
        if passed_on:
            self._out.append(PassOn([record.expert for record in passed_on]))
        self._evicted(given_up)
        if slots:
            self._issued(absent[: len(slots)], slots)

    def _absent(self, numbers: NDArray[np.int64], most: int | None) -> list[Record]:
        """The first of them, up to so many."""
        records = map(self._records.__getitem__, self._uses.outside(numbers))
        return list(islice((record for record in records if record.place is State.ABSENT), most))

    def _give_up(self, count: int, event: Fetch) -> list[Record]:
        """Up to so many of whom the step does not use and whose slots may be written, those who give way first."""
        unready = [self._uses.number(expert) for expert in event.unready.values()]
        spared = np.concatenate([event.numbers, np.array(unready, np.int64)])
        given = self._uses.give_way(count, np.concatenate([spared, event.untold]))
        if len(given) < count and len(event.untold):
            given += self._uses.give_way(count - len(given), spared)
        return [self._records[number] for number in given]

    def _evicted(self, records: Sequence[Record]) -> None:
        """resident → absent, as `Residency.evict`; whose their slots are is settled."""
        residency = self._residency
        there, tell = residency.slots_by_layer, residency.story.tell
        for record in records:
            layer, expert = record.expert
            if record.pending:
                residency.settle_prefetch(record, "wasted")
            there[layer][expert] = -1
            tell(record.expert, "evicted by a plan from slot", record.slot)
            record.slot, record.place = -1, State.ABSENT
        nbytes = _bytes(records)
        residency.idle_bytes -= nbytes
        residency.resident_bytes -= nbytes
        residency.counters.evictions["capacity"] += len(records)

    def _issued(self, records: list[Record], slots: list[int]) -> None:
        """absent → loading, as `Residency.load`."""
        residency, counters = self._residency, self._residency.counters
        first, tell = residency.last_load + 1, residency.story.tell
        first_of, notable = self._uses.first, self._uses.notable
        for load_id, (record, slot) in enumerate(zip(records, slots, strict=True), first):
            record.slot, record.load_id, record.place, record.pending = slot, load_id, State.LOADING, True
            record.priority = Priority.PREFETCH
            layer, expert = record.expert
            notable[first_of[layer] + expert] = FETCHED
            tell(record.expert, "fetched into slot", slot)
        residency.last_load += len(records)
        residency.loads.update(enumerate(records, first))
        experts = [record.expert for record in records]
        residency.prefetching.update(zip(experts, records, strict=True))
        residency.prefetching_bytes += _bytes(records)
        counters.prefetch_issued += len(records)
        counters.prefetch_pending += len(records)
        for begin in range(0, len(records), _TOGETHER):
            chunk = slice(begin, begin + _TOGETHER)
            self._last_fetch += 1
            self._fetching[self._last_fetch] = records[chunk]
            self._out.append(Fetching(self._last_fetch, experts[chunk], slots[chunk]))

    def arrange(self) -> None:
        """There is time now to find out who will give way for the next step."""
        self._uses.arrange()

    # ------------------------------------------------------------ when its copies are complete

    def _fetched(self, event: Fetched) -> None:
        """loading → resident, as `Residency.arrive`."""
        if (records := self._fetching.pop(event.number, None)) is None:
            raise self._residency.story.error(f"law 3: fetch {event.number} ended, but is not in flight")
        residency, idle = self._residency, list[int]()
        for record in records:
            layer, expert = record.expert
            residency.end_load(record.load_id)
            if record.place is State.DOOMED:
                record.facts.probation = True
            record.place = State.RESIDENT
            residency.slots_by_layer[layer][expert] = record.slot
            if not record.leases:
                residency.idle_bytes += record.nbytes
                idle.append(self._uses.first[layer] + expert)
        nbytes = _bytes(records)
        residency.resident_bytes += nbytes
        residency.counters.prefetch_loads += len(records)
        residency.counters.prefetch_bytes += nbytes
        self._uses.offer(idle)

    # ------------------------------------------------------------ what steps met

    def foreseen_until(self, position: int) -> None:
        """The running step has come to `position`: hints for uses before it are not worth a copy any more."""
        self._foresight.position = max(self._foresight.position, position)

    def _met(self, event: Met) -> None:
        """One by one only those of whom there is more to tell than their use."""
        self._tell_uses()
        counters, sources = self._residency.counters, event.sources
        notes = self._notable[event.numbers]
        self._notable[event.numbers] = 0
        told = (notes, event.layers, event.numbers, sources)
        for note, layer, number, source in zip(*(one[notes != 0].tolist() for one in told), strict=True):
            record = self._records[number]
            if note == FETCHED and record.facts.next_use is None:
                counters.covered[layer] += 1
                self._residency.settle_prefetch(record, "used" if source == HIT else "late")
            else:
                used_at = event.position + layer * event.stride + record.expert.expert
                counters.covered[layer] += self._come_true(record, used_at, source, note)
        self._uses.use(event.numbers, self._foresight.lookups)
        self._foresight.lookups += len(event.numbers)
        self.foreseen_until(event.position + int(event.layers[-1]) * event.stride)
        by_result = {"hit": counters.hits, "late": counters.late, "miss": counters.misses}
        for source, result in _RESULTS:
            layers, pairs = event.layers[sources == source], event.pairs[sources == source]
            _add(by_result[result], np.bincount(layers).tolist())
            _add(counters.activations[result], np.bincount(layers, pairs).tolist())
        read = [self._records[number].nbytes for number in event.numbers[sources == READ].tolist()]
        counters.demand_loads += len(read)
        counters.demand_bytes += sum(read)

    def _tell_uses(self) -> None:
        if self._used:
            self._uses.use(self._used, self._foresight.lookups - len(self._used))
            self._used = []
        self._used_layer = -1

    def _come_true(self, record: Record, used_at: int, source: int, note: int) -> bool:
        """What was foreseen up to this use is past, and so is a prefetch for it; whether the use was foreseen."""
        facts = record.facts
        next_use = facts.next_use
        self._foresight.forget_until(record, used_at)
        if record.pending:
            self._residency.settle_prefetch(record, "used" if source == HIT else "late")
        if facts.next_use is not None:
            self._note(record)
        if facts.ticket:
            self._residency.victims.offer(facts)
        return note == FETCHED or (next_use is not None and next_use <= used_at)

    def _note(self, record: Record) -> None:
        """Its next use is more than history."""
        self._uses.notable[self._uses.number(record.expert)] = NOTED


def _add(totals: list[int], more: Sequence[float]) -> None:
    for index, count in enumerate(more):
        totals[index] += int(count)


def _bytes(records: Iterable[Record]) -> int:
    return sum(record.nbytes for record in records)
