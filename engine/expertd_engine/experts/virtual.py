"""Virtual experts (SwapMoE, arXiv 2308.15030): which experts a layer holds for virtual mode, and which it swaps. Pure.

Owner: the engine thread. Tokens of virtual steps are routed among the *held* experts of each layer. What the unmasked
router would have sent to every expert is summed into a score over a sliding window, so an expert that is not held can
come back; a swap brings in the best of those for the worst of the held. Where a layer can be foreseen, what the step
will ask of it is brought in on the way there. Either is asynchronous: the victim serves until the newcomer's bytes are
there. Three brakes keep it from thrashing: hysteresis, swaps a layer may begin in one step, and loads under way at
once, which bounds the share of the disk that virtual mode may take.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from expertd_engine.errors import EngineError, ResourceError
from expertd_engine.experts.events import ExpertId

_LEAST = 1e-300
_RESCALE = 2.0**200
"""Where the growing unit of scores is divided out again, long before floats end."""


@dataclass(frozen=True, slots=True)
class SwapLimits:
    """How fast held sets may follow the text."""

    half_life: float = 16.0
    """Tokens of one sequence after which an observation counts half. On routes of converted models 16 to 24 substitute
    least; 4 and 64 substitute 5 to 10 % more."""
    hysteresis: float = 0.25
    """A newcomer's score must be above the victim's by this share. Against none it saves half the swaps and substitutes
    2 % more."""
    per_step: int = 1
    """Swaps that one layer may begin after a step; 0: none."""
    ahead: int = 2
    """Swaps that one layer may begin in a step, before the step comes to it, where that is foreseen."""
    in_flight: int = 1
    """Loads under way at once in all layers, but for those without which no token could be computed."""
    foreseen: int = 0
    """Swaps that all layers together may begin as a step begins, where its tokens tell what they will ask for."""

    def __post_init__(self) -> None:
        counts_are_sound = min(self.per_step, self.ahead, self.foreseen) >= 0 and self.in_flight >= 1
        if not (self.half_life > 0 and self.hysteresis >= 0 and counts_are_sound):
            raise ValueError(
                f"{self} is not allowed: half_life > 0, hysteresis, per_step, ahead, foreseen ≥ 0, in_flight ≥ 1"
            )


@dataclass(frozen=True, slots=True)
class Hold:
    """Bring the expert into memory and keep it there until `Release`; answered by `arrived` or `failed`."""

    expert: ExpertId


@dataclass(frozen=True, slots=True)
class Release:
    """The expert may go; it is not among the held any more."""

    expert: ExpertId


Action = Hold | Release

_GONE = -1
"""In a victim's place: it has left already."""


@dataclass(slots=True)
class _Layer:
    """One layer's sets: an expert is held, coming or outside. Best and worst are kept, not sought, at each token."""

    prior: Sequence[float]
    slots: int = 0
    held: set[int] = field(default_factory=set)
    coming: dict[int, int | None] = field(default_factory=dict)
    """Newcomer → the held expert it replaces, or `_GONE`; None: it fills a free slot."""
    scores: array[float] = field(init=False)
    """By expert. Side by side in memory: each token meets them all after a step has gone over the caches."""
    unit: float = 1.0
    """What an observation made now counts for: scores are never aged, the unit grows instead."""
    observed: bool = False
    """Since swaps were last chosen."""
    barred: set[int] = field(default_factory=set)
    """Could not be loaded, and have not been observed since: asking again at once would ask for ever."""
    _best: int | None = None
    _worst: int | None = None
    _known: bool = False
    """Whether `_best` and `_worst` are right."""

    def __post_init__(self) -> None:
        self.scores = array("d", bytes(8 * len(self.prior)))

    @property
    def free(self) -> int:
        vacant = self.slots - len(self.held)
        return vacant - sum(victim in (None, _GONE) for victim in self.coming.values()) if self.coming else vacant

    def rank(self, expert: int) -> tuple[float, float]:
        return self.scores[expert], self.prior[expert]

    def outside(self) -> list[int]:
        inside = self.held.union(self.coming, self.barred)
        return [expert for expert in range(len(self.prior)) if expert not in inside]

    def victims(self) -> set[int]:
        """Held, and not being replaced already."""
        return self.held.difference(self.coming.values())

    @property
    def keeps_best_and_worst(self) -> bool:
        """Whether observations may change who they are."""
        return self._known or bool(self.barred)

    def add(self, expert: int, value: float) -> None:
        """Observe one expert."""
        score = self.scores[expert] = self.scores[expert] + value * self.unit
        if expert in self.barred:
            self.barred.remove(expert)
            self._known = False
        if not self._known:
            return
        if expert == self._worst:
            self._known = False
            return
        is_outside = expert not in self.held and expert not in self.coming
        if is_outside and self._best is not None and (score, self.prior[expert]) > self.rank(self._best):
            self._best = expert

    def changed(self) -> None:
        """A set has changed."""
        self._known = False

    def best(self) -> int | None:
        """Of the experts outside."""
        self._seek()
        return self._best

    def worst(self) -> int | None:
        """Of the victims."""
        self._seek()
        return self._worst

    def gain(self) -> float:
        """What a swap would win, in observations made now."""
        best, worst = self.best(), self.worst()
        if best is None or worst is None:
            return 0.0
        return (self.scores[best] - self.scores[worst]) / self.unit

    def _seek(self) -> None:
        if not self._known:
            self._best = max(self.outside(), key=self.rank, default=None)
            self._worst = min(self.victims(), key=self.rank, default=None)
            self._known = True


class _Spare:
    """Who of a layer may go as a step begins. An expert is worth the share of the layer's weight that it will have, and
    that it had of late."""

    def __init__(self, layer: _Layer, expected: Sequence[float]) -> None:
        scores = self._scores = layer.scores
        total = self._total = max(sum(scores), _LEAST)
        self._expected = expected
        worth = [(expected[expert] + scores[expert] / total, expert) for expert in layer.victims()]
        self._victims = sorted(worth, reverse=True)

    def give_way_to(self, newcomer: int, factor: float) -> int | None:
        """Whoever is worth least, if the newcomer is worth more than so many times that."""
        worth = self._expected[newcomer] + self._scores[newcomer] / self._total
        if not self._victims or worth <= self._victims[-1][0] * factor:
            return None
        return self._victims.pop()[1]


class VirtualExperts:
    """The held sets of all MoE layers. Methods that return actions want them carried out, in order.

    `priors[layer][expert]` rank experts that no observation tells apart, such as ‖E‖; `top_k` is the least a layer may
    hold: a token needs so many. There are no sets before the first `resize` and after `stop`.
    """

    def __init__(self, priors: Sequence[Sequence[float]], top_k: int, limits: SwapLimits) -> None:
        self.priors = priors
        self.top_k = top_k
        self.limits = limits
        self.swaps = [0] * len(priors)
        """Ended well, by layer, since start."""
        self._layers = [_Layer(prior) for prior in priors]
        self._loading = 0
        self._has_room = False
        """A layer may have a free slot: looking at all of them after every load is what this saves."""

    # ------------------------------------------------------------ queries

    @property
    def slots(self) -> list[int]:
        """By layer; zeros while there are no sets."""
        return [layer.slots for layer in self._layers]

    @property
    def is_open(self) -> bool:
        return any(layer.slots for layer in self._layers)

    @property
    def is_ready(self) -> bool:
        """Whether every layer holds enough for a token."""
        return all(len(layer.held) >= self.top_k for layer in self._layers)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is on its way."""
        return self._loading == 0

    def held(self, layer: int) -> frozenset[int]:
        return frozenset(self._layers[layer].held)

    def to_be_held(self, layer: int) -> frozenset[int]:
        """Who will be held there once all that is on its way has come."""
        return frozenset(self._layers[layer].victims().union(self._layers[layer].coming))

    def holds(self, layer: int, experts: Iterable[int]) -> bool:
        """Whether it holds them."""
        return self._layers[layer].held.issuperset(experts)

    def holds_all(self, layer: int) -> bool:
        """Whether nobody can be missed there."""
        return len(self._layers[layer].held) == len(self._layers[layer].prior)

    def score(self, layer: int, expert: int) -> float:
        """Its windowed score, an observation made now counting in full."""
        at = self._layers[layer]
        return at.scores[expert] / at.unit

    # ------------------------------------------------------------ size

    def resize(self, slots: Sequence[int], at_hand: Iterable[ExpertId] = ()) -> list[Action]:
        """Give each layer so many slots; what is too much goes at once, the lowest score first.

        Free slots take experts `at_hand` (in memory already); a layer short of `top_k` is filled up to that now, and
        beyond as loads end. Raises ResourceError below `top_k` slots.
        """
        self._check_slots(slots)
        near: dict[int, list[int]] = {}
        for layer, expert in at_hand:
            near.setdefault(layer, []).append(expert)
        actions: list[Action] = []
        self._has_room = True
        for number, count in enumerate(slots):
            self._layers[number].slots = count
            actions += self._shrink(number)
            actions += self._adopt(number, near.get(number, ()))
        return actions + self._fill()

    def stop(self) -> list[Action]:
        """Give every expert up, those on their way as they arrive. Scores stay for the next sets to begin with."""
        actions: list[Action] = []
        for number, layer in enumerate(self._layers):
            layer.slots = 0
            layer.coming = dict.fromkeys(layer.coming)
            actions += [self._release(number, expert) for expert in sorted(layer.held)]
        return actions

    # ------------------------------------------------------------ events

    def observe(self, layer: int, sums: Mapping[int, float]) -> None:
        """What the unmasked router sent to experts of `layer` in this step: sums over tokens of ‖x‖·g·‖E‖."""
        self.observe_each(layer, sums.keys(), sums.values())

    def observe_each(self, layer: int, experts: Iterable[int], sums: Iterable[float]) -> None:
        """As `observe`, with the sum of each expert in its place."""
        at = self._layers[layer]
        at.observed = True
        if at.keeps_best_and_worst:
            for expert, value in zip(experts, sums, strict=True):
                at.add(expert, value)
        else:
            scores, unit = at.scores, at.unit
            for expert, value in zip(experts, sums, strict=True):
                scores[expert] += value * unit

    def foresee(self, layer: int, expected: Mapping[int, float]) -> list[Action]:
        """The step under way will probably ask `layer` for these experts, for so much each: bring in those that are not
        held, the most expected first, for held ones of which less is expected, the lowest score first."""
        at = self._layers[layer]
        if at.free > 0:  # it is being filled
            return []
        lacking = sorted(expected.keys() - at.held - at.coming.keys() - at.barred, key=lambda e: (-expected[e], e))
        if not lacking:
            return []
        spare = sorted(at.victims(), key=lambda e: (expected.get(e, 0.0), at.rank(e)))
        actions: list[Action] = []
        for newcomer, victim in zip(lacking[: self.limits.ahead], spare, strict=False):
            enough = expected[newcomer] > expected.get(victim, 0.0) * (1 + self.limits.hysteresis)
            if self._loading >= self.limits.in_flight or not enough:
                break
            actions.append(self._hold(layer, newcomer, victim))
        return actions

    def bring(self, wanted: Iterable[ExpertId], expected: Callable[[int], Sequence[float]]) -> list[Action]:
        """The step that begins will probably ask for `wanted`; `expected` says of a layer what share of its weight each
        expert will have. Bring in, the first first, those that are worth more than a held one.

        That one leaves at once: its room is the newcomer's, and it is what the step misses least.
        """
        actions: list[Action] = []
        spare: dict[int, _Spare] = {}
        for number, newcomer in wanted:
            if self._loading >= self.limits.in_flight or len(actions) >= 2 * self.limits.foreseen:
                break
            layer = self._layers[number]
            inside = newcomer in layer.held or newcomer in layer.coming or newcomer in layer.barred
            if inside or layer.free > 0 or len(layer.held) <= self.top_k:
                continue
            victims = spare.get(number) or spare.setdefault(number, _Spare(layer, expected(number)))
            victim = victims.give_way_to(newcomer, 1 + self.limits.hysteresis)
            if victim is not None:
                actions += [self._release(number, victim), self._hold(number, newcomer, _GONE)]
        return actions

    def end_step(self, tokens: float) -> list[Action]:
        """The step's observations are in: choose swaps, then age all scores by `tokens`, those of one sequence."""
        actions: list[Action] = []
        for number in self._by_gain() if self.limits.per_step else ():
            actions += self._swap(number)
        growth = 2.0 ** min(tokens / self.limits.half_life, math.log2(_RESCALE))
        for layer in self._layers:
            layer.observed = False
            layer.unit *= growth
            if layer.unit > _RESCALE:
                layer.scores = array("d", [score / layer.unit for score in layer.scores])
                layer.unit = 1.0
        return actions + self._fill()

    def arrived(self, expert: ExpertId) -> list[Action]:
        """The bytes that `Hold` asked for are there: the newcomer serves, whom it replaces goes."""
        number, newcomer = expert
        layer = self._layers[number]
        victim = self._leave(number, newcomer)
        layer.held.add(newcomer)
        self._layers[number].changed()
        actions: list[Action] = []
        self.swaps[number] += victim == _GONE or victim in layer.held
        if victim in layer.held:
            actions.append(self._release(number, victim))
        if len(layer.held) > layer.slots:
            actions += self._shrink(number)
        return actions + self._fill() if self._has_room else actions

    def failed(self, expert: ExpertId) -> list[Action]:
        """It cannot be loaded now; it may be chosen again once it has been observed anew."""
        self._leave(*expert)
        return self._bar(expert)

    def lose(self, expert: ExpertId) -> list[Action]:
        """A held expert is not there any more; it may be chosen again once it has been observed anew."""
        layer = self._layers[expert.layer]
        layer.held.remove(expert.expert)
        return self._bar(expert)

    # ------------------------------------------------------------ choices

    def _bar(self, expert: ExpertId) -> list[Action]:
        """Not to be chosen until it has been observed anew; let others come."""
        layer = self._layers[expert.layer]
        layer.scores[expert.expert] = 0.0
        layer.barred.add(expert.expert)
        self._has_room = True
        layer.changed()
        return self._fill()

    def _check_slots(self, slots: Sequence[int]) -> None:
        for number, (layer, count) in enumerate(zip(self._layers, slots, strict=True)):
            if not self.top_k <= count <= len(layer.prior):
                raise ResourceError(
                    f"{count} virtual slots for MoE layer {number} are not allowed: give {self.top_k}, which every "
                    f"token needs, to {len(layer.prior)}, which are all"
                )

    def _by_gain(self) -> list[int]:
        """Observed layers, largest gain first: loads under way are few and must go where they win most."""
        gains = [(-layer.gain(), number) for number, layer in enumerate(self._layers) if layer.observed]
        return [number for gain, number in sorted(gains) if gain < 0]

    def _swap(self, number: int) -> list[Action]:
        layer = self._layers[number]
        actions: list[Action] = []
        while len(actions) < self.limits.per_step and self._loading < self.limits.in_flight and layer.free <= 0:
            newcomer, victim = layer.best(), layer.worst()
            if newcomer is None or victim is None:
                break
            if layer.scores[newcomer] <= layer.scores[victim] * (1 + self.limits.hysteresis):
                break
            actions.append(self._hold(number, newcomer, victim))
        return actions

    def _adopt(self, number: int, near: Iterable[int]) -> list[Action]:
        """Hold what costs no read, as far as slots are free."""
        layer = self._layers[number]
        known = layer.held.union(layer.coming)
        ranked = sorted((e for e in near if e not in known), key=layer.rank, reverse=True)
        return [self._hold(number, expert) for expert in ranked[: max(0, layer.free)]]

    def _fill(self) -> list[Action]:
        """Let experts come into free slots: what a token cannot do without at once, the rest a few at a time."""
        actions: list[Action] = []
        if not self._has_room:
            return actions
        for number, layer in enumerate(self._layers):
            while layer.free > 0:
                urgent = len(layer.held) + len(layer.coming) < self.top_k
                if not urgent and self._loading >= self.limits.in_flight:
                    break
                best = layer.best()
                if best is None:
                    break
                actions.append(self._hold(number, best))
        self._has_room = any(layer.free > 0 for layer in self._layers)
        return actions

    def _shrink(self, number: int) -> list[Action]:
        layer = self._layers[number]
        actions: list[Action] = []
        while len(layer.held) > layer.slots and (worst := layer.worst()) is not None:
            actions.append(self._release(number, worst))
        return actions

    # ------------------------------------------------------------ transitions

    def _hold(self, number: int, newcomer: int, victim: int | None = None) -> Hold:
        self._layers[number].coming[newcomer] = victim
        self._layers[number].changed()
        self._loading += 1
        return Hold(ExpertId(number, newcomer))

    def _leave(self, number: int, newcomer: int) -> int | None:
        """The newcomer is no longer on its way; whom it was to replace."""
        coming = self._layers[number].coming
        if newcomer not in coming:
            raise EngineError(f"expert {newcomer} of MoE layer {number} ended a load that nobody asked for")
        self._loading -= 1
        return coming.pop(newcomer)

    def _release(self, number: int, expert: int) -> Release:
        self._layers[number].held.remove(expert)
        self._layers[number].changed()
        return Release(ExpertId(number, expert))
