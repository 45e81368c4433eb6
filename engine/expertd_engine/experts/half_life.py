"""How soon uses are forgotten: chosen by what each candidate would have missed of late, in small shadow caches. Pure.

What is best is a matter of model and traffic: where topics drift, what was used a hundred tokens ago misleads; where
some experts are always in demand, forgetting them costs a tenth of all misses. Experts are sampled by hash, as for the
clairvoyant estimate, and shadow caches scaled alike; a use of a sampled expert costs a few microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from expertd_engine.experts.sampling import sampled_experts

SAMPLED = 64
"""Experts followed, at most."""
CANDIDATES = (5.5, 16.0, 48.0)
"""Tokens. The first holds until another has proved itself."""
_JUDGED_EVERY = 64
"""Tokens; what was counted before counts half."""
_MARGIN = 0.03
"""Of its misses, that another candidate must save to be taken."""


def with_use(weight: float, now: float) -> float:
    """An aged count, as log2 and in half-lives, after one more use at `now`."""
    if weight < now:
        return now + math.log2(1.0 + 2.0 ** (weight - now))
    return weight + math.log2(1.0 + 2.0 ** (now - weight))


class _Shadow:
    """A cache of sampled experts that forgets with one half-life, in lookups."""

    def __init__(self, half_life: int) -> None:
        self.half_life = half_life
        self.misses = 0.0
        self._weights: dict[tuple[int, int], float] = {}
        self._resident: set[tuple[int, int]] = set()

    def use(self, expert: tuple[int, int], lookup: int, room: int) -> None:
        self._weights[expert] = with_use(self._weights.get(expert, -math.inf), lookup / self.half_life)
        if expert in self._resident:
            return
        self.misses += 1
        while len(self._resident) >= room:
            self._resident.remove(min(self._resident, key=self._weights.__getitem__))
        self._resident.add(expert)


class HalfLives:
    """Told of every use by decoding tokens. `current` is the half-life that holds, in lookups; `room` of the shadows is
    scaled from `slots`, which may change.
    """

    def __init__(self, experts: Sequence[int], lookups_per_token: int, most: int = SAMPLED) -> None:
        """`experts` of each layer; `lookups_per_token` is MoE layers × top-k."""
        chosen = sampled_experts(experts, most)
        self.sampled = frozenset(chosen)
        self.slots = 0
        """That the whole cache has; 0: not told yet, nothing is learned."""
        self._share = len(chosen) / sum(experts)
        self._shadows = [_Shadow(max(1, round(tokens * lookups_per_token))) for tokens in CANDIDATES]
        self._current = self._shadows[0]
        self._period = _JUDGED_EVERY * lookups_per_token
        self._next = self._period

    @property
    def current(self) -> int:
        return self._current.half_life

    def use(self, expert: tuple[int, int], lookup: int) -> None:
        """One of `sampled` is used, as the lookup of that number."""
        if self.slots:
            room = max(1, round(self.slots * self._share))
            for shadow in self._shadows:
                shadow.use(expert, lookup, room)

    def judge(self, lookup: int) -> bool:
        """So many lookups have been; whether another half-life holds from now on."""
        if lookup < self._next:
            return False
        self._next = lookup + self._period
        before, best = self._current, min(self._shadows, key=lambda shadow: shadow.misses)
        if best.misses < (1 - _MARGIN) * before.misses:
            self._current = best
        for shadow in self._shadows:
            shadow.misses /= 2
        return self._current is not before
