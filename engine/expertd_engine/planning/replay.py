"""Replays recorded routes through the real residency ledger and the real virtual sets: what a budget would have met.

Pure, and without time: a load ends as soon as it is asked for, so what is counted is who had to be loaded, not when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from expertd_engine.experts.accounting import lease_window
from expertd_engine.experts.events import Demand, Event, ExpertId, Granted, Load, Loaded, Release, Tick
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.lookahead import Lookahead, NoLookahead
from expertd_engine.experts.policy import Policy, Victims
from expertd_engine.experts.swaps import Action, Hold, SwapLimits
from expertd_engine.experts.virtual import VirtualExperts

Routes = Sequence[Sequence[Sequence[int]]]
"""By token, MoE layer and choice: expert ids."""


@dataclass(slots=True)
class Met:
    """What the replay of decode steps, a token each, met."""

    tokens: int = 0
    lookups: int = 0
    misses: int = 0
    by_layer: list[int] = field(default_factory=list)
    """Misses."""
    together: Counter[int] = field(default_factory=Counter)
    """How often a layer of a token missed so many experts, at least one."""

    @property
    def hit_rate(self) -> float:
        return 1 - self.misses / self.lookups if self.lookups else 1.0

    def missing(self) -> list[float]:
        """Layers of a token that missed n + 1 experts, on average, at entry n."""
        most = max(self.together, default=0)
        return [self.together[n] / max(1, self.tokens) for n in range(1, most + 1)]


class LedgerReplay:
    """One ledger in which loads take no time."""

    def __init__(
        self,
        record_bytes: Sequence[int],
        experts: Sequence[int],
        budget_bytes: int,
        policy: Policy,
        lookahead: Lookahead | None = None,
        victims: Victims | None = None,
    ) -> None:
        """`lookahead` tells next uses, as it does while serving; nothing is prefetched. `victims` as for `Ledger`."""
        self._lookahead = lookahead or NoLookahead()
        self._ledger = Ledger(record_bytes, experts, budget_bytes, policy, prefetch=False, victims=victims)
        self._width = max(experts)
        self._period = self._width * len(experts)
        self._window = lease_window(budget_bytes, max(record_bytes))
        self._granted: list[int] = []
        self._lease = 0
        self._tokens = 0

    def token(self, layers: Sequence[Sequence[int]], met: Met | None = None) -> None:
        """One token's routes; counted if `met` is given."""
        for layer, chosen in enumerate(layers):
            asked = [ExpertId(layer, expert) for expert in sorted(chosen)]
            windows = [asked[i : i + self._window] for i in range(0, len(asked), self._window)]
            misses = sum(map(self._use, windows))
            if met is not None:
                met.lookups += len(chosen)
                met.misses += misses
                met.by_layer[layer] += misses
                met.together[misses] += misses > 0
        self._tokens += 1
        self._ledger.handle(Tick(self._tokens * self._period))
        if met is not None:
            met.tokens += 1

    def _use(self, experts: Sequence[ExpertId]) -> int:
        """A layer leases these together; how many had to be loaded."""
        events: list[Event] = [self._demand(expert) for expert in experts]
        loads = 0
        while events:
            out = self._ledger.handle_all(events)
            loaded = [Loaded(one.load_id) for one in out if isinstance(one, Load)]
            self._granted += [one.lease_id for one in out if isinstance(one, Granted)]
            loads += len(loaded)
            events = list(loaded)
            if not events:  # all is granted, or the rest waits for room
                events, self._granted = [Release(lease) for lease in self._granted], []
        return loads

    def _demand(self, expert: ExpertId) -> Demand:
        self._lease += 1
        position = self._tokens * self._period + expert.layer * self._width + expert.expert
        return Demand(self._lease, expert, position, self._lookahead.next_use(expert, position))


def replay_exact(
    routes: Routes,
    record_bytes: Sequence[int],
    experts: Sequence[int],
    budget_bytes: int,
    policy: Policy,
    warm: int,
    lookahead: Lookahead | None = None,
    stream: int = 0,
) -> Met:
    """Exact mode in an expert budget, by an engine that has served for long: every expert was used once before, and the
    first `warm` tokens are not counted; of each `stream` tokens, if they are those of one sequence after the other."""
    replay = LedgerReplay(record_bytes, experts, budget_bytes, policy, lookahead)
    replay.token([range(count) for count in experts])
    met = Met(by_layer=[0] * len(experts))
    for number, token in enumerate(routes):
        replay.token(token, met if (number % stream if stream else number) >= warm else None)
    return met


@dataclass(frozen=True, slots=True)
class Choice:
    """What one token's router chose in one layer."""

    experts: Sequence[int]
    weights: Sequence[float]
    importance: Sequence[float]
    """‖x‖·g·‖E‖ of each."""
    expected: Mapping[int, float] = field(default_factory=dict)
    """What the layer before foresaw."""


def replay_virtual(
    tokens: Sequence[Choice], prior: Sequence[float], top_k: int, slots: int, limits: SwapLimits, warm: int
) -> float:
    """One layer in virtual mode: substituted mass a token."""
    sets = VirtualExperts([prior], top_k, replace(limits, foreseen=min(limits.foreseen, 1)))
    _settle(sets, sets.resize([slots]))
    lost = 0.0
    for number, choice in enumerate(tokens):
        if limits.foreseen:
            _bring(sets, choice.expected)
        else:
            _settle(sets, sets.foresee(0, choice.expected))
        held = sets.held(0)
        if number >= warm:
            missing = sum(w for e, w in zip(choice.experts, choice.weights, strict=True) if e not in held)
            lost += missing / max(sum(choice.weights), 1e-30)
        sets.observe(0, dict(zip(choice.experts, choice.importance, strict=True)))
        _settle(sets, sets.end_step(1))
    return lost / max(1, len(tokens) - warm)


def _bring(sets: VirtualExperts, expected: Mapping[int, float]) -> None:
    """As a step begins; of the swaps that all layers may begin together a layer gets one at most, as it seldom gets
    more."""
    wanted = sorted(expected.keys() - sets.held(0), key=lambda expert: (-expected[expert], expert))
    shares = [expected.get(expert, 0.0) for expert in range(len(sets.priors[0]))]
    for swap in sets.bring([ExpertId(0, expert) for expert in wanted], lambda layer: shares):
        _settle(sets, sets.arrived(swap.newcomer))


def _settle(sets: VirtualExperts, actions: list[Action]) -> None:
    while actions:
        actions = [next_ for a in actions if isinstance(a, Hold) for next_ in sets.arrived(a.expert)]
