"""What the ledger counts: bytes by slot, loads and lookups since start, and the recent story of each expert. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from expertd_engine.experts.events import Drop, ExpertId, Instruction, LookupResult, Priority
from expertd_engine.histogram import Histogram
from expertd_engine.snapshot import HistogramData

PrefetchOutcome = Literal["used", "late", "wasted", "cancelled"]

StallCause = Literal["disk_read", "expert_wait", "link_estimated", "host_compute"]
"""`disk_read`: a demanded record is being read; `expert_wait`: it has no slot yet, loads given up must end first;
`link_estimated`: a kernel read it over a device's link, where nobody can look at the clock: bytes ÷ bandwidth;
`host_compute`: the processor computed it for a device, which may have gone on with others meanwhile."""

STALL_BOUNDS_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 40.0)


MIN_WINDOW = 5
WINDOW_SHARE = 8
"""A layer asks at once for an eighth of the slots at most, or `MIN_WINDOW`: each lease takes a slot from the experts
that could stay. On a cycle over 480 experts with 120 slots, 5 give 24 % hits, a whole layer of 16 gives 22 %."""


class LedgerError(AssertionError):
    """A bug of ours: an event that cannot be, or a law that does not hold. Carries the expert's recent story."""


class Story:
    """The last transitions of all experts, kept so that an error can tell how it came about."""

    def __init__(self, length: int = 2048) -> None:
        self._lines: deque[tuple[ExpertId, str, int]] = deque(maxlen=length)

    def tell(self, expert: ExpertId, what: str, number: int) -> None:
        self._lines.append((expert, what, number))

    def error(self, message: str, expert: ExpertId | None = None) -> LedgerError:
        """The error to raise: `message` and the recent lines about `expert` (None: about all)."""
        lines = [line for line in self._lines if expert is None or line[0] == expert][-20:]
        told = "".join(f"\n  {of.layer}/{of.expert}: {what} {number}" for of, what, number in lines)
        return LedgerError(f"{message}; recently:{told or ' nothing'}")


@dataclass(slots=True)
class Counters:
    """Cumulative since start, but for `prefetch_pending`. Loads and bytes count when the load has ended well.

    Every prefetch issued ends as exactly one of used (first demand after it was loaded), late (demanded before),
    wasted (read in vain: given up or evicted before any demand, or failed) or cancelled (given up before it began);
    until then it is pending.

    Lists are by MoE layer. A lookup is one (step, layer, expert); an activation one (token, choice) pair, counted by
    where its expert was when it was demanded; a lookup is covered if a hint had named that very use before.
    """

    hits: list[int]
    late: list[int]
    misses: list[int]
    covered: list[int]
    activations: dict[LookupResult, list[int]]
    demand_loads: int = 0
    demand_bytes: int = 0
    prefetch_loads: int = 0
    prefetch_bytes: int = 0
    prefetch_issued: int = 0
    prefetch_used: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    prefetch_cancelled: int = 0
    prefetch_pending: int = 0
    prefetch_outcome_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(get_args(PrefetchOutcome), 0))
    """Lengths of the records whose prefetch ended so; of a cancelled one nothing was read."""
    load_failures: int = 0
    evictions: dict[str, int] = field(default_factory=lambda: {"capacity": 0, "budget_change": 0})

    @classmethod
    def of(cls, layers: int) -> Counters:
        """Zeros for a model of so many MoE layers."""
        hits, late, misses, covered = ([0] * layers for _ in range(4))
        return cls(hits, late, misses, covered, {result: [0] * layers for result in get_args(LookupResult)})

    def count_lookup(self, layer: int, result: LookupResult, pairs: int, foreseen: bool) -> None:
        """One use of one expert of `layer`, by `pairs` (token, choice) pairs."""
        by_layer = self.hits if result == "hit" else self.late if result == "late" else self.misses
        by_layer[layer] += 1
        self.covered[layer] += foreseen
        self.activations[result][layer] += pairs

    def count_load(self, priority: Priority, nbytes: int) -> None:
        """A load has brought its bytes."""
        if priority is Priority.DEMAND:
            self.demand_loads += 1
            self.demand_bytes += nbytes
        else:
            self.prefetch_loads += 1
            self.prefetch_bytes += nbytes

    def end_prefetch(self, outcome: PrefetchOutcome, nbytes: int) -> None:
        """A pending prefetch of a record of `nbytes` has ended."""
        self.prefetch_pending -= 1
        self.prefetch_outcome_bytes[outcome] += nbytes
        if outcome == "used":
            self.prefetch_used += 1
        elif outcome == "late":
            self.prefetch_late += 1
        elif outcome == "wasted":
            self.prefetch_wasted += 1
        else:
            self.prefetch_cancelled += 1

    def prefetch_ended_or_pending(self) -> int:
        """Equals `prefetch_issued`."""
        ended = self.prefetch_used + self.prefetch_late + self.prefetch_wasted + self.prefetch_cancelled
        return ended + self.prefetch_pending

    def reads_ahead(self) -> tuple[int, int]:
        """Prefetches that were read and have ended, and how many of them were wasted."""
        return self.prefetch_used + self.prefetch_late + self.prefetch_wasted, self.prefetch_wasted

    def lookups(self) -> int:
        """Of all layers and results."""
        return sum(self.hits) + sum(self.late) + sum(self.misses)


class Stalls:
    """Time in which the running step stood still because an expert's bytes were missing. Seconds."""

    def __init__(self, causes: Sequence[StallCause] = ("disk_read", "expert_wait")) -> None:
        self._seconds: dict[StallCause, float] = dict.fromkeys(causes, 0.0)
        self._before: dict[StallCause, float] = dict(self._seconds)
        self._steps = {cause: Histogram(STALL_BOUNDS_S) for cause in self._seconds}

    @property
    def total_s(self) -> float:
        """Of all causes, since start."""
        return sum(self._seconds.values())

    def by_cause(self) -> dict[str, float]:
        return {str(cause): seconds for cause, seconds in self._seconds.items()}

    def by_step(self) -> dict[str, HistogramData]:
        """How long steps stood still; steps that did not are not counted."""
        return {str(cause): histogram.data() for cause, histogram in self._steps.items()}

    def add(self, cause: StallCause, seconds: float) -> None:
        self._seconds[cause] += seconds

    def end_step(self) -> None:
        """What was added since the last call belongs to one step."""
        for cause, seconds in self._seconds.items():
            if seconds > self._before[cause]:
                self._steps[cause].add(seconds - self._before[cause])
        self._before = dict(self._seconds)


def lease_window(budget_bytes: int, record_bytes: int) -> int:
    """Leases that a layer may hold at once, for records of at most that length."""
    return max(MIN_WINDOW, budget_bytes // record_bytes // WINDOW_SHARE)


def slots_needed(record_bytes: Sequence[int], budget_bytes: int) -> int:
    """The most records that `budget_bytes` can hold at once, given the length of each: the smallest first."""
    count = 0
    for nbytes in sorted(record_bytes):
        budget_bytes -= nbytes
        if budget_bytes < 0:
            break
        count += 1
    return count


class Slots:
    """Room for records, each slot as long as the largest; memory is committed by what is written and dropped.

    `charged` is the sum over slots of the most bytes written since the slot was last dropped, so it is what the
    system has committed, between any two instructions too. A free slot is dropped and costs nothing. A *vacated*
    slot has lost its record but is still charged: it is reused, or dropped before the event's handling ends.
    """

    def __init__(self, count: int) -> None:
        self.charged = 0
        self.peak = 0
        self.vacated_bytes = 0
        self._bytes = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._vacated: list[int] = []

    @property
    def occupied(self) -> int:
        """Bytes that belong to a record, present or on its way."""
        return self.charged - self.vacated_bytes

    def vacate(self, slot: int) -> None:
        self._vacated.append(slot)
        self.vacated_bytes += self._bytes[slot]

    def take(self, nbytes: int, limit: int, out: list[Instruction]) -> int:
        """A slot to write `nbytes` into, which must fit `limit` together with all that is occupied.

        Prefers a vacated slot (its pages are there already) and drops what would push `charged` over the limit.
        """
        slot = self._reuse() if self._vacated else self._free.pop()
        held = self._bytes[slot]
        while self._vacated and self.charged - held + nbytes > limit:
            self._drop(self._reuse(), out)
        if self.charged - held + nbytes > limit:
            raise LedgerError(f"law 1: a load of {nbytes} bytes on top of {self.charged - held} is above {limit}")
        if held > nbytes:
            out.append(Drop(slot, nbytes))
        self._bytes[slot] = nbytes
        self.charged += nbytes - held
        self.peak = max(self.peak, self.charged)
        return slot

    def drop_vacated(self, out: list[Instruction]) -> None:
        while self._vacated:
            self._drop(self._reuse(), out)

    def check(self, owned: dict[int, int], story: Story) -> None:
        """`owned` maps slots to the bytes of the record in each. Raises LedgerError where they differ from ours."""
        if {slot: nbytes for slot, nbytes in enumerate(self._bytes) if nbytes} != owned or self._vacated:
            raise story.error(f"slots hold {self._bytes}, vacated {self._vacated}, but records own {owned}")
        if sorted([*self._free, *owned]) != list(range(len(self._bytes))):
            raise story.error(f"free slots {sorted(self._free)} and owned ones {sorted(owned)} are not all slots")
        if self.charged != sum(owned.values()) or self.charged > self.peak:
            raise story.error(f"charged {self.charged} of peak {self.peak} bytes, records hold {sum(owned.values())}")

    def _reuse(self) -> int:
        slot = self._vacated.pop()
        self.vacated_bytes -= self._bytes[slot]
        return slot

    def _drop(self, slot: int, out: list[Instruction]) -> None:
        self.charged -= self._bytes[slot]
        self._bytes[slot] = 0
        self._free.append(slot)
        out.append(Drop(slot))
