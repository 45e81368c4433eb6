"""The residency ledger of a device whose steps read what is absent over the link. A pure state machine.

Owner: the engine thread. The laws are those of `ledger`, with these differences: steps lease nothing, because a step
runs as one launch and nobody asks before, and the only leases are those of experts that virtual mode keeps; what a step
did is told when it has ended, so uses and landings come a step late and may tell of experts that have gone meanwhile;
and the device has the last word on what a use met.

1. charged bytes ≤ budget: slots in use, whole, set-aside ones included.
2. A slot that a launched step may read is not written: only a slot that has cooled is given to a copy, or any while no
   launched step may read anything (`device_plan`); and the slots that steps write into themselves were handed to them.
3. One owner for each slot, at most one copy in flight for each expert. A second copy that came about all the same,
   because a step landed what was being copied, is retired.
4. Prefetches go into slots set aside, or, of a step all of whose routes are known, into those of experts that it does
   not use; what is known to be needed sooner is not evicted for what is needed later, as far as the policy knows.
5. and 6. As in `ledger`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from expertd_engine.experts.accounting import StallCause
from expertd_engine.experts.device_events import (
    COMPUTED,
    LANDED,
    READ,
    SHARED,
    WAITED,
    Adopt,
    Confine,
    Cooled,
    DeviceEvent,
    DeviceInstruction,
    Fetch,
    Fetched,
    Fill,
    Keep,
    Landed,
    Lend,
    LetGo,
    Met,
    Provide,
    Retire,
    Seen,
)
from expertd_engine.experts.device_plan import PlanningLedger
from expertd_engine.experts.device_pool import ChunkPlan, Use
from expertd_engine.experts.device_uses import Uses
from expertd_engine.experts.events import (
    Cancelled,
    ExpertId,
    Loaded,
    LookupResult,
    Predict,
    Priority,
    Remember,
    SetBudget,
    Tick,
)
from expertd_engine.experts.policy import Policy
from expertd_engine.experts.residency import Record, State

_RESULTS: tuple[LookupResult, ...] = ("hit", "miss", "late", "miss", "miss", "miss")
"""By source."""
_OVER_LINK = (READ, LANDED)
_STAYS = (Cooled, Fetch, Fetched)
"""Events after which the same give way as before, but for those that these bring in or take out."""
_HINTED_TICKS = 2


class DeviceLedger(PlanningLedger):
    """Takes events, returns the instructions to carry out, in order.

    `record_bytes[l]` is the length in bytes of a record of MoE layer l, which has `experts_per_layer[l]` experts; each
    lies in a slot of the chunks that `plan` describes. `budget_bytes` may later be set anywhere from `minimum_bytes` to
    `max_budget_bytes` (default: `budget_bytes`). At most `prefetch_depth` prefetches are in flight; without `prefetch`,
    hints only tell the policy about next uses. `uses` are those of these experts and this policy; by default, one by
    one. Raises BudgetError for a budget below the minimum.
    """

    def __init__(
        self,
        record_bytes: Sequence[int],
        experts_per_layer: Sequence[int],
        plan: ChunkPlan,
        budget_bytes: int,
        policy: Policy,
        max_budget_bytes: int | None = None,
        prefetch: bool = True,
        prefetch_depth: int = 8,
        uses: Uses | None = None,
    ) -> None:
        super().__init__(
            record_bytes, experts_per_layer, plan, budget_bytes, policy, max_budget_bytes, prefetch, prefetch_depth,
            Uses(experts_per_layer, policy) if uses is None else uses,
        )  # fmt: skip
        self.duplicates = 0
        self.brings_in = False
        """Whether what the processor had to compute, or a part of, is copied in behind, where that is worth a slot: it
        does not land, and little else does."""
        self.fell_short = False
        """Whether nothing was copied for want of a slot to prefetch into, at any time since somebody last took note."""
        self.brought_in = 0
        """Copies begun of what the processor had to compute."""
        self._hinted = 0
        """Ticks for which slots and link are left to what hints name."""
        self.fetches = prefetch
        """Whether what is known of a step is brought in."""
        self._computed: dict[ExpertId, Record] = {}
        """What the processor had to compute of late, the latest last."""
        self._begin_plans()
        records = iter(self._records)
        self._by_layer = [[next(records) for _ in range(count)] for count in experts_per_layer]
        self._handlers: dict[type, Callable[[Any], None]] = {
            Seen: self._seen, Landed: self._landed, Predict: self._predict, Loaded: self._loaded, Tick: self._tick,
            Cancelled: self._cancelled, Cooled: self._cooled, Provide: self._provide, Fill: self._fill,
            Confine: self._confine, Lend: self._lend, Adopt: self._adopt, SetBudget: self._set_budget,
            Remember: self._recall_uses, Keep: self._keep, LetGo: self._let_go, Fetch: self._fetch,
            Fetched: self._fetched, Met: self._met,
        }  # fmt: skip

    def handle_all(self, events: Iterable[DeviceEvent]) -> list[DeviceInstruction]:
        """Take in events that come together; prefetches begin after the last of them.

        Raises LedgerError for one that cannot be, BudgetError or ResourceError for a budget outside the allowed range;
        the events before it have then been taken in.
        """
        out = self._out = []
        self._residency.out = out  # type: ignore[assignment]  # it only appends loads and cancellations
        for event in events:
            self._handlers[type(event)](event)
            if type(event) not in _STAYS:
                self._uses.disarrange()
        self._tell_uses()
        if self.wanted:
            self._serve_wanted()
        if not self._still:
            self._start_prefetches()
            self._bring_in()
        return out

    def prefetch_at_most(self, depth: int) -> None:
        """From now on, so many prefetches may be in flight."""
        self._prefetch_depth = depth

    # ------------------------------------------------------------ queries

    @property
    def is_refilling(self) -> bool:
        """Never while it serves: what an earlier engine held is filled in before."""
        return False

    def stall_cause(self) -> StallCause:
        """Steps on a device wait for the link alone, and that is estimated."""
        return "link_estimated"

    def is_idle(self) -> bool:
        """Whether no copy is in flight."""
        return not self._residency.loads

    # ------------------------------------------------------------ what steps did

    def _seen(self, event: Seen) -> None:
        """The hottest loop of a token: 384 uses for 48 layers of 8. `Victims` need not be told of who only rose."""
        if event.layer <= self._used_layer or event.scan:
            self._tell_uses()  # another step: an expert may be used again
        covered, first, notable = 0, self._uses.first[event.layer], self._uses.notable
        numbers = [first + index for index in event.experts]
        for index, number, source in zip(event.experts, numbers, event.sources, strict=True):
            if note := notable[number]:
                notable[number] = 0
                used_at = event.position + index
                covered += self._come_true(self._by_layer[event.layer][index], used_at, source, note)
        self._foresight.lookups += len(numbers)
        if event.scan:
            self._scan(event)
        else:
            self._used += numbers
            self._used_layer = event.layer
        if self.brings_in and not event.scan and (COMPUTED in event.sources or SHARED in event.sources):
            self._note_computed(event)
        self.foreseen_until(event.position)
        self._count_seen(event, covered)

    def _scan(self, event: Seen) -> None:
        """Uses by prompt tokens alone, which are lookups already: the working set's recency is decoding's own."""
        first = self._foresight.lookups - len(event.experts) + 1
        for lookup, index in enumerate(event.experts, first):
            record = self._by_layer[event.layer][index]
            if record.place is not State.RESIDENT or record.facts.probation:
                record.facts.probation, record.facts.last_use = True, lookup

    def _count_seen(self, event: Seen, covered: int) -> None:
        counters, layer = self._residency.counters, event.layer
        counters.covered[layer] += covered
        counters.demand_bytes += event.shared_bytes
        if not any(event.sources):  # most layers of a step that is worth its hints: all hits
            counters.hits[layer] += len(event.experts)
            counters.activations["hit"][layer] += sum(event.pairs)
            return
        by_result = {"hit": counters.hits, "late": counters.late, "miss": counters.misses}
        for source in set(event.sources):
            count, result = event.sources.count(source), _RESULTS[source]
            by_result[result][layer] += count
            met = event.pairs
            if count < len(event.sources):
                met = [n for n, one in zip(event.pairs, event.sources, strict=True) if one == source]
            counters.activations[result][layer] += sum(met)
            if source in _OVER_LINK:
                counters.demand_loads += count
                counters.demand_bytes += count * self._by_layer[layer][0].nbytes

    def _note_computed(self, event: Seen) -> None:
        for index, source in zip(event.experts, event.sources, strict=True):
            if source in (COMPUTED, SHARED):
                record = self._by_layer[event.layer][index]
                self._computed.pop(record.expert, None)
                self._computed[record.expert] = record

    def _landed(self, event: Landed) -> None:
        record = self._residency.record(event.expert)
        if self.pool.use(event.slot) is not Use.HANDED:
            problem = f"law 2: a step wrote into slot {event.slot}, which is {self.pool.use(event.slot).name.lower()}"
            raise self._residency.story.error(problem, event.expert)
        if not event.whole or record.place is not State.ABSENT:
            self.duplicates += event.whole
            self.pool.put(event.slot, Use.COOLING)
            self._out.append(Retire(event.slot, event.expert))
            return
        self._residency.story.tell(record.expert, "landed in slot", event.slot)
        self.pool.own(event.slot, record.nbytes)
        record.slot = event.slot
        record.facts.probation = event.scan
        self._residency.arrive(record)

    def _predict(self, event: Predict) -> None:
        """Most hints say what is known: they come again with every layer that routes."""
        for hint in event.hints:
            (layer, expert), needed_at = hint.expert, hint.needed_at
            record = self._by_layer[layer][expert]
            if record.facts.next_use == needed_at and (record.place is not State.ABSENT or record.hinted == needed_at):
                continue
            self._foresight.foresee(record, needed_at)
            self._note(record)
            if record.place is State.ABSENT:
                self._hinted = _HINTED_TICKS

    def _tick(self, event: Tick) -> None:
        self._tell_uses()
        self._foresight.advance(event.position)
        self._hinted = max(0, self._hinted - 1)
        self._adapt(self.pool.limit)

    # ------------------------------------------------------------ copies

    def _loaded(self, event: Loaded) -> None:
        """Of a copy that was given up too late the bytes are there all the same: it may stay until room is needed."""
        record = self._residency.end_load(event.load_id)
        self.counters.count_load(record.priority, record.nbytes)
        record.facts.probation = record.facts.probation or record.place is State.DOOMED
        self._residency.arrive(record)

    def _cancelled(self, event: Cancelled) -> None:
        record = self._residency.end_load(event.load_id)
        if record.place is not State.DOOMED:
            raise self._residency.story.error(f"law 3: load {event.load_id} was cancelled unasked", record.expert)
        self._residency.settle_prefetch(record, "cancelled")
        slot = record.slot
        self._residency.vacate(record)
        self.pool.put(slot, Use.COLD)  # nothing was written, nothing was published

    def _fill(self, event: Fill) -> None:
        for expert in event.experts:
            record = self._residency.record(expert)
            if self.pool.first(Use.COLD, Use.FREE) is None:
                return
            if record.place is State.ABSENT:
                self._residency.fill(record, self.budget_bytes)

    def _start_prefetches(self) -> None:
        """Prefetch along the hints, soonest first, into slots that may be written now."""
        while len(self._residency.prefetching) < self._prefetch_depth:
            foreseen = self._foresight.soonest()
            if foreseen is None:
                return
            if self.pool.first(Use.COLD, Use.FREE) is None:
                self.fell_short |= not self._residency.loads
                return
            self._residency.load(foreseen[1], Priority.PREFETCH, self.budget_bytes)
            self._foresight.prefetched(foreseen[1])
            self._note(foreseen[1])

    def _bring_in(self) -> None:
        """Copy in what the processor had to compute, the latest first, if that is worth more than who would give way
        next. Where hints name absent experts, these come first.
        """
        if self._hinted:
            return
        loads = self._residency.loads
        while self._computed and len(loads) < self._prefetch_depth and self.pool.first(Use.COLD, Use.FREE) is not None:
            _, record = self._computed.popitem()
            if record.place is State.ABSENT and self._is_worth_a_slot(record):
                self._residency.fill(record, self.budget_bytes)
                self.brought_in += 1

    def _is_worth_a_slot(self, record: Record) -> bool:
        victims = self._residency.victims
        if self.pool.number(Use.FREE) or not len(victims):
            return True  # nobody gives way
        first = victims.take()
        victims.offer(first)
        return first.probation or self._policy.rank(record.facts) > self._policy.rank(first)


assert _RESULTS[LANDED] == "miss" and _RESULTS[WAITED] == "late"
