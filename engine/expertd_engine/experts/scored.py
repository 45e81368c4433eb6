"""Victims by scores of a predictor: all of a layer's scores change whenever it has routed, so there is no heap to keep.

Owner: the ledger; the predictor tells `rescore`. Array operations over all experts, a few microseconds each.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.policy import Facts, Victims

_PROBATION = -(2.0**53)
_KNOWN = 2.0**52


class Scored:
    """The policy `predicted`: least likely to be used soon first. `Victims` of this policy are `ScoredVictims`."""

    name = "predicted"

    def __init__(self, layers: int, experts: int) -> None:
        self.scores: NDArray[np.float64] = np.zeros((layers, experts))
        """Logits of soon being used again; of no meaning until a layer has routed."""

    def used(self, facts: Facts) -> None:
        return None

    def rank(self, facts: Facts) -> float:
        return float(self.scores[facts.expert])

    def adapt(self, lookups: int, slots: int, known: Iterable[Facts]) -> bool:
        return False


class ScoredVictims(Victims):
    """Experts that may give way, in the order of their scores.

    As with every policy, those on probation go before all others and those whose next use is known after.
    """

    def __init__(self, policy: Scored) -> None:
        super().__init__(policy)
        self._policy = policy
        self._experts = policy.scores.shape[1]
        self._keys = np.full(policy.scores.shape, np.inf)
        """Infinite for all that may not give way."""
        self._plain = np.zeros(policy.scores.shape, bool)
        """Ordered by score alone."""
        self._facts: dict[int, Facts] = {}

    def rescore(self, layer: int, scores: NDArray[np.float32]) -> None:
        """The layer's experts `[E]` are likely to be used soon by these logits from now on."""
        self._policy.scores[layer, : len(scores)] = scores
        plain = self._plain[layer]
        self._keys[layer, plain] = self._policy.scores[layer, plain]

    def offer(self, facts: Facts) -> None:
        self.withdraw(facts)
        self._live += 1
        facts.ticket = 1
        layer, expert = facts.expert
        self._facts[layer * self._experts + expert] = facts
        self._plain[layer, expert] = not facts.probation and facts.next_use is None
        self._keys[layer, expert] = self._key(facts)

    def rose(self, facts: Facts) -> None:
        self.offer(facts)

    def withdraw(self, facts: Facts) -> None:
        if facts.ticket:
            facts.ticket = 0
            self._live -= 1
            self._keys[facts.expert] = np.inf
            self._plain[facts.expert] = False

    def take(self) -> Facts:
        facts = self._facts[int(self._keys.argmin())]
        self.withdraw(facts)
        return facts

    def _key(self, facts: Facts) -> float:
        if facts.probation:
            return _PROBATION + facts.last_use
        if facts.next_use is not None:
            return _KNOWN - facts.next_use
        return self._policy.rank(facts)
