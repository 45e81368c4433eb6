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
from collections.abc import Callable, Iterable, Mapping, Sequence

from expertd_engine.errors import EngineError, ResourceError
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.held_layer import GONE, HeldLayers, Spare
from expertd_engine.experts.swaps import Action, Hold, Release, Swap, SwapLimits

_RESCALE = 2.0**200
"""Where the growing unit of scores is divided out again, long before floats end."""


class VirtualExperts(HeldLayers):
    """The held sets of all MoE layers. Methods that return actions want them carried out, in order.

    `priors[layer][expert]` rank experts that no observation tells apart, such as ‖E‖; `top_k` is the least a layer may
    hold: a token needs so many. There are no sets before the first `resize` and after `stop`.
    """

    def __init__(self, priors: Sequence[Sequence[float]], top_k: int, limits: SwapLimits) -> None:
        super().__init__(priors, top_k, keeps=limits.per_step > 0)
        self.limits = limits
        self.swaps = [0] * len(priors)
        """Ended well, by layer, since start."""
        self._observed: set[int] = set()
        """Layers, since swaps were last chosen."""
        self._barring: set[int] = set()
        """Layers in which somebody may be barred."""
        self._has_room = False
        """A layer may have a free slot: looking at all of them after every load is what this saves."""

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
        self.observe_each([layer], [(sums.keys(), sums.values())])

    def observe_each(self, layers: Sequence[int], sums: Iterable[tuple[Iterable[int], Iterable[float]]]) -> None:
        """As `observe`, of several layers: in each the experts, and the sum of each in its place."""
        known, unit = self._layers, self.unit
        self._observed.update(layers)
        for layer, (experts, values) in zip(layers, sums, strict=True):
            known[layer].observe(experts, values, unit)

    def observed(self, layers: Iterable[int]) -> None:
        """Observations of these layers have been added to `scores`, each times `unit`."""
        if not self.limits.per_step:
            return
        self._observed.update(layers)
        for layer in layers:
            self._layers[layer].observed()

    def foresee(self, layer: int, expected: Mapping[int, float]) -> list[Action]:
        """The step under way will probably ask `layer` for these experts, for so much each: bring in those that are not
        held, the most expected first, for held ones of which less is expected, the lowest score first."""
        at = self._layers[layer]
        if at.free > 0:  # it is being filled
            return []
        outside = expected.keys() - at.held - at.coming.keys() - at.still_barred()
        lacking = sorted(outside, key=lambda e: (-expected[e], e))
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

    @property
    def may_begin(self) -> int:
        """Swaps that may begin as a step begins."""
        return max(0, min(self.limits.foreseen, self.limits.in_flight - self._loading))

    @property
    def is_plain(self) -> bool:
        """Whether sets are what is held and what comes for somebody who has left: no free slot, nobody barred."""
        follows = not self.limits.per_step and not self.limits.ahead
        barred = any(self._layers[number].still_barred() for number in self._barring)
        return follows and not self._has_room and not barred

    def bring(self, wanted: Iterable[ExpertId], expected: Callable[[int], Sequence[float]]) -> list[Swap]:
        """The step that begins will probably ask for `wanted`; `expected` says of a layer what share of its weight each
        expert will have. Bring in, the first first, those that are worth more than a held one.

        That one leaves at once: its room is the newcomer's, and it is what the step misses least.
        """
        swaps: list[Swap] = []
        most = self.may_begin
        spare: dict[int, Spare] = {}
        for number, newcomer in wanted:
            if len(swaps) >= most:
                break
            layer = self._layers[number]
            inside = newcomer in layer.held or newcomer in layer.coming or newcomer in layer.still_barred()
            if inside or layer.free > 0 or len(layer.held) <= self.top_k:
                continue
            victims = spare.get(number) or spare.setdefault(number, Spare(layer, expected(number)))
            victim = victims.give_way_to(newcomer, 1 + self.limits.hysteresis)
            if victim is not None:
                swaps.append(self._swap_out(number, newcomer, victim))
        return swaps

    def exchange(self, swaps: Iterable[tuple[ExpertId, ExpertId]]) -> list[Swap]:
        """What `bring` would have chosen: newcomers, and who leaves for each."""
        return [self._swap_out(newcomer.layer, newcomer.expert, victim.expert) for newcomer, victim in swaps]

    def end_step(self, tokens: float) -> list[Action]:
        """The step's observations are in: choose swaps, then age all scores by `tokens`, those of one sequence."""
        actions: list[Action] = []
        for number in self._by_gain() if self.limits.per_step else ():
            actions += self._swap(number)
        self._observed.clear()
        self.unit *= 2.0 ** min(tokens / self.limits.half_life, math.log2(_RESCALE))
        if self.unit > _RESCALE:
            for layer in self._layers:
                layer.divide(self.unit)
            self.unit = 1.0
        return actions + self._fill()

    def arrived(self, expert: ExpertId) -> list[Action]:
        """The bytes that `Hold` asked for are there: the newcomer serves, whom it replaces goes."""
        number, newcomer = expert
        layer = self._layers[number]
        victim = self._leave(number, newcomer)
        layer.held.add(newcomer)
        self._layers[number].changed()
        actions: list[Action] = []
        self.swaps[number] += victim == GONE or victim in layer.held
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
        self._barring.add(expert.layer)
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
        gains = sorted((-self._layers[number].gain(), number) for number in self._observed)
        return [number for gain, number in gains if gain < 0]

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

    def _swap_out(self, number: int, newcomer: int, victim: int) -> Swap:
        self._layers[number].held.remove(victim)
        self._hold(number, newcomer, GONE)
        return Swap(ExpertId(number, newcomer), ExpertId(number, victim))

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
