"""The facts of a device's experts, and their uses, told of many at once. Pure; owned by the device's ledger.

Here one after another, which is the specification; `device_columns` does the same to arrays.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.policy import Facts, Policy, Victims


class Uses:
    """Experts are numbered layer by layer: expert e of layer l is number `first[l] + e`."""

    def __init__(self, experts_per_layer: Sequence[int], policy: Policy) -> None:
        self.first = [0, *accumulate(experts_per_layer)][:-1]
        self.experts = [ExpertId(layer, e) for layer, count in enumerate(experts_per_layer) for e in range(count)]
        self.notable = array("b", bytes(len(self.experts)))
        """Not 0: more than its history may change when the expert is used. Whoever hints or prefetches says so."""
        self.policy = policy
        self.facts: Sequence[Facts] = self._make_facts()
        self.victims = self._make_victims()

    def use(self, numbers: Sequence[int], lookups: int) -> None:
        """Different experts were used by decoding tokens, in this order, after so many lookups."""
        for lookup, number in enumerate(numbers, lookups + 1):
            facts = self.facts[number]
            facts.probation, facts.last_use = False, lookup
            self.policy.used(facts)

    def _make_facts(self) -> Sequence[Facts]:
        return [Facts(expert) for expert in self.experts]

    def _make_victims(self) -> Victims:
        return Victims(self.policy)
