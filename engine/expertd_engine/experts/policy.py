"""Which resident expert gives way: pure rankings behind one protocol, and the queue of experts that may give way.

Owner: the ledger. It tells `Victims` which experts are resident and unleased; nothing else is ever looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Protocol

from expertd_engine.errors import ConfigError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.half_life import CANDIDATES, HalfLives, with_use


@dataclass(slots=True, eq=False)
class Facts:
    """What is known of one expert's uses, past and future, whether it is resident or not.

    `last_use` counts lookups; `next_use` is the position of the soonest known use. `weight` belongs to the policy: an
    aged count of uses, or an importance. `probation` puts the expert before all others when room is needed: prompt
    tokens alone brought it in (law 5), or the use it was loaded for did not come. `ticket` belongs to `Victims`.
    """

    expert: ExpertId
    last_use: int = -1
    next_use: int | None = None
    weight: float = -math.inf
    probation: bool = False
    ticket: int = 0


class Policy(Protocol):
    """A ranking. Whoever ranks lowest gives way first; ties go to the least recently used.

    A policy by predicted next use reads `Facts.next_use` like the exact one (hints write it); a policy by importance
    ranks by `Facts.weight`, whose owner offers the expert again when it changes.
    """

    name: str

    def used(self, facts: Facts) -> None:
        """A use by a decoding token has happened; `facts.last_use` says when. May update `facts.weight`."""

    def rank(self, facts: Facts) -> float:
        """The expert's rank. Constant between changes of `facts`: ageing must not depend on when it is asked."""

    def adapt(self, lookups: int, slots: int, known: Iterable[Facts]) -> bool:
        """So many lookups have been, and there is room for `slots` experts. May change how experts are ranked, and with
        it the weights of all that are `known`: whether ranks have changed.
        """


class LRU:
    """Least recently used first."""

    name = "lru"

    def used(self, facts: Facts) -> None:
        return None

    def rank(self, facts: Facts) -> float:
        return facts.last_use

    def adapt(self, lookups: int, slots: int, known: Iterable[Facts]) -> bool:
        return False


class LFU:
    """Least frequently used first; a use counts half as much after every `half_life` lookups.

    The weight is log2 of the sum over uses of 2^(lookup / half_life): all weights age by the same factor, so their
    order stands without ever being touched, and the logarithm keeps the sum finite.
    """

    name = "lfu"

    def __init__(self, half_life: int) -> None:
        self.half_life = half_life

    def used(self, facts: Facts) -> None:
        facts.weight = with_use(facts.weight, facts.last_use / self.half_life)

    def rank(self, facts: Facts) -> float:
        return facts.weight

    def adapt(self, lookups: int, slots: int, known: Iterable[Facts]) -> bool:
        return False


class NextUse(LFU):
    """Belady where the next use is known, furthest first; before those go all without a known one, by aged frequency.

    What is known reaches a few layers to a token ahead, so an expert without a known use is the better victim.
    """

    name = "next-use"

    def rank(self, facts: Facts) -> float:
        return super().rank(facts) if facts.next_use is None else KNOWN - facts.next_use


class AdaptiveNextUse(NextUse):
    """`NextUse` with the half-life that serves best of late."""

    def __init__(self, half_lives: HalfLives) -> None:
        super().__init__(half_lives.current)
        self._half_lives, self.sampled = half_lives, half_lives.sampled

    def used(self, facts: Facts) -> None:
        now, weight = facts.last_use / self.half_life, facts.weight
        # `with_use`, in place: hundreds of times a token
        facts.weight = now + _log2(1.0 + 2.0 ** (weight - now)) if weight < now else with_use(weight, now)
        if facts.expert in self.sampled:
            self._half_lives.use(facts.expert, facts.last_use)

    def sample(self, uses: Iterable[Facts]) -> None:
        """Uses of `sampled` experts, whose weights are up to date: show them to the shadow caches."""
        for facts in uses:
            self._half_lives.use(facts.expert, facts.last_use)

    def adapt(self, lookups: int, slots: int, known: Iterable[Facts]) -> bool:
        self._half_lives.slots = slots
        if not self._half_lives.judge(lookups):
            return False
        before, self.half_life = self.half_life, self._half_lives.current
        for facts in known:  # counts stay what they are at this lookup: only from now on they age otherwise
            facts.weight += lookups / self.half_life - lookups / before
        return True


def weight_from_now(policy: Policy, facts: Facts, lookups: int) -> float:
    """The expert's weight, were lookups counted anew after so many."""
    return facts.weight - lookups / policy.half_life if isinstance(policy, LFU) else facts.weight


_log2 = math.log2
KNOWN = 2.0**52
"""Above any weight; integers up to there are exact."""
HALF_LIFE_TOKENS = CANDIDATES[0]
"""Of a use, where it is not chosen while serving."""

_POLICIES: dict[str, Callable[[int], Policy]] = {"lru": lambda _: LRU(), "lfu": LFU, "next-use": NextUse}


def make_policy(name: str, lookups_per_token: int = 128, half_life_tokens: float = HALF_LIFE_TOKENS) -> Policy:
    """A fresh policy by its name. Raises ConfigError for an unknown one.

    `lookups_per_token`: MoE layers × top-k; `half_life_tokens` of a use, for policies that count them.
    """
    if name not in _POLICIES:
        raise ConfigError(f"expert policy {name!r} is not known: choose from {', '.join(_POLICIES)}")
    return _POLICIES[name](max(1, round(half_life_tokens * lookups_per_token)))


def serving_policy(name: str, experts: Sequence[int], top_k: int, half_life_tokens: float | None = None) -> Policy:
    """As `make_policy`, for layers of so many `experts`; where none is given, the half-life of `next-use` adapts."""
    lookups = len(experts) * top_k
    if name == NextUse.name and half_life_tokens is None:
        return AdaptiveNextUse(HalfLives(experts, lookups))
    return make_policy(name, lookups, half_life_tokens or HALF_LIFE_TOKENS)


class Victims:
    """Experts that may give way, in the policy's order: a heap with lazy deletion, O(log n) a change.

    An entry is valid while its ticket is the one in the expert's facts. It never says more of an expert than holds: who
    has risen since is put back where it belongs when it comes up, which for most never happens.
    """

    LOOK = 4
    """How many experts a prefetch may look at for one that is needed later than the prefetched."""

    def __init__(self, policy: Policy) -> None:
        self._rank = policy.rank
        self._heap: list[tuple[bool, float, int, int, Facts]] = []
        self._last_ticket = 0
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def offer(self, facts: Facts) -> None:
        """The expert may give way; or it already might, and its facts have changed."""
        self.withdraw(facts)
        self._live += 1
        self._last_ticket += 1
        facts.ticket = self._last_ticket
        heappush(self._heap, (*self._order(facts), facts.ticket, facts))
        if len(self._heap) > 2 * self._live + 64:
            self._heap = [entry for entry in self._heap if entry[3] == entry[4].ticket]
            heapify(self._heap)

    def rose(self, facts: Facts) -> None:
        """The facts of an expert that may give way have changed, and it does not go before others for that."""

    def rank_anew(self) -> None:
        """The policy ranks otherwise from now on."""
        for facts in [entry[4] for entry in self._heap if entry[3] == entry[4].ticket]:
            self.offer(facts)

    def withdraw(self, facts: Facts) -> None:
        """The expert may not give way any more, if it might."""
        if facts.ticket:
            facts.ticket = 0
            self._live -= 1

    def take(self) -> Facts:
        """Take out the expert that gives way first. There must be one."""
        while True:
            entry = heappop(self._heap)
            ticket, facts = entry[3], entry[4]
            if ticket != facts.ticket:
                continue
            if (now := self._order(facts)) > entry[:3]:
                heappush(self._heap, (*now, ticket, facts))
                continue
            self.withdraw(facts)
            return facts

    def _order(self, facts: Facts) -> tuple[bool, float, int]:
        return not facts.probation, self._rank(facts), facts.last_use

    def take_needed_after(self, position: int) -> Facts | None:
        """Take out the first of the `LOOK` next experts with no known use up to `position`; None if there is none."""
        spared: list[Facts] = []
        found = None
        while found is None and self._live and len(spared) < self.LOOK:
            facts = self.take()
            if facts.next_use is None or facts.next_use > position:
                found = facts
            else:
                spared.append(facts)
        for facts in spared:
            self.offer(facts)
        return found
