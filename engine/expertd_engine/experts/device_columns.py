"""`Uses` in columns: a token's hundreds of uses are one operation on arrays, and so is the search for who gives way.

Owner: the device's ledger. Objects share the arrays, so that whoever looks at a single expert sees what is there.
"""

from __future__ import annotations

import math
from array import array
from bisect import insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.device_uses import Uses
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.policy import KNOWN, LFU, LRU, AdaptiveNextUse, Facts, NextUse, Policy, Victims

_CHOSEN = 128
"""Looked for at once."""
_UNKNOWN = -1
"""No known next use."""
_Order = tuple[bool, float, int]


class _Columns:
    """One item an expert, each seen by Python and by numpy."""

    def __init__(self, count: int) -> None:
        self.last_use = array("q", [-1]) * count
        self.next_use = array("q", [_UNKNOWN]) * count
        self.weight = array("d", [-math.inf]) * count
        self.probation = array("b", [0]) * count
        self.ticket = array("q", [0]) * count
        self.last_uses: NDArray[np.int64] = np.frombuffer(self.last_use, np.int64)
        self.next_uses: NDArray[np.int64] = np.frombuffer(self.next_use, np.int64)
        self.weights: NDArray[np.float64] = np.frombuffer(self.weight, np.float64)
        self.probations: NDArray[np.int8] = np.frombuffer(self.probation, np.int8)
        self.tickets: NDArray[np.int64] = np.frombuffer(self.ticket, np.int64)


class ColumnFacts(Facts):
    """A row."""

    __slots__ = ("_columns", "number")

    def __init__(self, expert: ExpertId, columns: _Columns, number: int) -> None:
        self.expert, self._columns, self.number = expert, columns, number

    @property
    def last_use(self) -> int:
        return self._columns.last_use[self.number]

    @last_use.setter
    def last_use(self, lookup: int) -> None:
        self._columns.last_use[self.number] = lookup

    @property
    def next_use(self) -> int | None:
        position = self._columns.next_use[self.number]
        return None if position == _UNKNOWN else position

    @next_use.setter
    def next_use(self, position: int | None) -> None:
        self._columns.next_use[self.number] = _UNKNOWN if position is None else position

    @property
    def weight(self) -> float:
        return self._columns.weight[self.number]

    @weight.setter
    def weight(self, weight: float) -> None:
        self._columns.weight[self.number] = weight

    @property
    def probation(self) -> bool:
        return bool(self._columns.probation[self.number])

    @probation.setter
    def probation(self, probation: bool) -> None:
        self._columns.probation[self.number] = probation

    @property
    def ticket(self) -> int:
        return self._columns.ticket[self.number]

    @ticket.setter
    def ticket(self, ticket: int) -> None:
        self._columns.ticket[self.number] = ticket


class ColumnVictims(Victims):
    """The next ones to give way are chosen together. A ticket only says that an expert may.

    All that may give way and come no later than the last one chosen are among the chosen, at a place that never says
    more of an expert than holds.
    """

    def __init__(self, policy: Policy, columns: _Columns, facts: Sequence[Facts]) -> None:
        super().__init__(policy)
        self._columns, self._facts = columns, facts
        self._by_recency, self._by_next_use = isinstance(policy, LRU), isinstance(policy, NextUse)
        self._chosen: list[tuple[bool, float, int, int]] = []
        self._next = 0
        self._last: _Order = (False, -math.inf, 0)
        self._arranged: NDArray[np.int64] | None = None
        """All in order, but for those `_offered` since; some may not give way any more."""
        self._offered: list[int] = []

    def offer(self, facts: Facts) -> None:
        assert isinstance(facts, ColumnFacts)
        ticket = self._columns.ticket
        if not ticket[facts.number]:
            ticket[facts.number] = 1
            self._live += 1
        self._place(self._order(facts), facts.number)

    def rank_anew(self) -> None:
        self._chosen, self._next = [], 0

    def take(self) -> Facts:
        while True:
            if self._next == len(self._chosen):
                self._choose()
            entry = self._chosen[self._next]
            self._next += 1
            facts = self._facts[entry[3]]
            if not facts.ticket:
                continue
            if (now := self._order(facts)) > entry[:3]:
                self._place(now, entry[3])
                continue
            self.withdraw(facts)
            return facts

    def arrange(self) -> None:
        """Put them all in the order of `take`, until `disarrange`."""
        columns, idle = self._columns, np.flatnonzero(self._columns.tickets)
        order = np.lexsort((columns.last_uses[idle], self._ranks(idle), columns.probations[idle] == 0))
        self._arranged, self._offered = idle[order], []

    def disarrange(self) -> None:
        """Some rank otherwise now."""
        self._arranged = None

    def take_all(self, count: int, spared: NDArray[np.int64]) -> list[int]:
        """The numbers of up to `count` of them, but for the `spared`, in the order of `take`."""
        may = self._columns.tickets != 0
        may[spared] = False
        if self._arranged is None or may[self._offered].any():
            self.arrange()
        assert self._arranged is not None, "it has just been"
        taken = self._arranged[may[self._arranged]][:count]
        self._columns.tickets[taken] = 0
        self._live -= len(taken)
        numbers: list[int] = taken.tolist()
        return numbers

    def offer_all(self, numbers: Sequence[int]) -> None:
        """As `offer`, of those that may not give way yet."""
        self._columns.tickets[numbers] = 1
        self._live += len(numbers)
        self._offered += numbers
        self.rank_anew()

    def _order(self, facts: Facts) -> _Order:
        assert isinstance(facts, ColumnFacts)
        columns, number = self._columns, facts.number
        weight, last_use = columns.weight[number], columns.last_use[number]
        if self._by_recency:
            return not columns.probation[number], last_use, last_use
        known = columns.next_use[number] if self._by_next_use else _UNKNOWN
        return not columns.probation[number], weight if known == _UNKNOWN else KNOWN - known, last_use

    def _place(self, order: _Order, number: int) -> None:
        if self._next < len(self._chosen) and order <= self._last:
            insort(self._chosen, (*order, number), lo=self._next)

    def _choose(self) -> None:
        columns = self._columns
        idle = np.flatnonzero(columns.tickets)
        ranks, on_probation = self._ranks(idle), columns.probations[idle] != 0
        first = np.where(on_probation, -np.inf, ranks)
        most = min(_CHOSEN, len(idle)) - 1
        taken = np.flatnonzero(first <= np.partition(first, most)[most])
        rows: list[Any] = [~on_probation[taken], ranks[taken], columns.last_uses[idle[taken]], idle[taken]]
        self._chosen = sorted(zip(*(row.tolist() for row in rows), strict=True))
        self._next, self._last = 0, self._chosen[-1][:3]

    def _ranks(self, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """As the policy's."""
        columns = self._columns
        if self._by_recency:
            return columns.last_uses[numbers].astype(np.float64)
        if not self._by_next_use:
            return columns.weights[numbers]
        known = columns.next_uses[numbers]
        return np.where(known == _UNKNOWN, columns.weights[numbers], KNOWN - known)


class ColumnUses(Uses):
    """Of a policy of this package's own: least recent use, or aged frequency with or without next uses."""

    def _make_facts(self) -> Sequence[Facts]:
        self._columns = _Columns(len(self.experts))
        sampled = self.policy.sampled if isinstance(self.policy, AdaptiveNextUse) else frozenset()
        self._sampled = np.array([expert in sampled for expert in self.experts])
        return [ColumnFacts(expert, self._columns, number) for number, expert in enumerate(self.experts)]

    def _make_victims(self) -> Victims:
        self._victims = ColumnVictims(self.policy, self._columns, self.facts)
        return self._victims

    def use(self, numbers: Sequence[int] | NDArray[np.int64], lookups: int) -> None:
        columns, policy, used = self._columns, self.policy, np.asarray(numbers)
        last = np.arange(lookups + 1, lookups + 1 + len(used))
        columns.probations[used], columns.last_uses[used] = 0, last
        if isinstance(policy, LFU):
            columns.weights[used] = np.logaddexp2(columns.weights[used], last / policy.half_life)  # as `with_use`
        if isinstance(policy, AdaptiveNextUse):
            policy.sample(self.facts[number] for number in used[self._sampled[used]].tolist())

    def arrange(self) -> None:
        self._victims.arrange()

    def disarrange(self) -> None:
        self._victims.disarrange()

    def outside(self, numbers: NDArray[np.int64]) -> list[int]:
        outside: list[int] = numbers[self._columns.tickets[numbers] == 0].tolist()
        return outside

    def give_way(self, count: int, spared: NDArray[np.int64]) -> list[int]:
        return self._victims.take_all(count, spared)

    def offer(self, numbers: Sequence[int]) -> None:
        self._victims.offer_all(numbers)


def uses_of(experts_per_layer: Sequence[int], policy: Policy) -> Uses:
    """The quickest there is for this policy."""
    return (ColumnUses if isinstance(policy, LRU | LFU) else Uses)(experts_per_layer, policy)
