"""The facts of a device's experts, and their uses, told of many at once. Pure; owned by the device's ledger.

Here one after another, which is the specification; `device_columns` does the same to arrays.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.policy import Facts, Policy, Victims

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOTED, FETCHED = 1, 2


class Uses:
    """Experts are numbered layer by layer: expert e of layer l is number `first[l] + e`."""

    def __init__(self, experts_per_layer: Sequence[int], policy: Policy) -> None:
        self.first = [0, *accumulate(experts_per_layer)][:-1]
        self.experts = [ExpertId(layer, e) for layer, count in enumerate(experts_per_layer) for e in range(count)]
        self.notable = array("b", bytes(len(self.experts)))
        """`NOTED`: more than its history may change when the expert is used; whoever hints or prefetches says so.
        `FETCHED`: likewise, for it was brought in for that use. Else 0."""
        self.policy = policy
        self.facts: Sequence[Facts] = self._make_facts()
        self.victims = self._make_victims()

    def use(self, numbers: Sequence[int] | NDArray[np.int64], lookups: int) -> None:
        """Different experts were used by decoding tokens, in this order, after so many lookups."""
        for lookup, number in enumerate(map(int, numbers), lookups + 1):
            facts = self.facts[number]
            facts.probation, facts.last_use = False, lookup
            self.policy.used(facts)

    def arrange(self) -> None:
        """There is time now to find out who gives way."""

    def disarrange(self) -> None:
        """It may be others from now on."""

    def outside(self, numbers: NDArray[np.int64]) -> list[int]:
        """Those of them that may not give way."""
        return [number for number in numbers.tolist() if not self.facts[number].ticket]

    def give_way(self, count: int, spared: NDArray[np.int64]) -> list[int]:
        """Take out up to `count` of those that may give way, in the order in which they do, but for the numbers
        `spared`."""
        passed_over, given = [], list[int]()
        while len(given) < count and len(self.victims):
            facts = self.victims.take()
            number = self.number(facts.expert)
            if number in spared:
                passed_over.append(facts)
            else:
                given.append(number)
        for facts in passed_over:
            self.victims.offer(facts)
        return given

    def offer(self, numbers: Sequence[int]) -> None:
        """These may give way from now on."""
        for number in numbers:
            self.victims.offer(self.facts[number])

    def number(self, expert: ExpertId) -> int:
        return self.first[expert.layer] + expert.expert

    def _make_facts(self) -> Sequence[Facts]:
        return [Facts(expert) for expert in self.experts]

    def _make_victims(self) -> Victims:
        return Victims(self.policy)
