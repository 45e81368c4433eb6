"""Held paths: virtual mode of a model whose router chooses one index for all layers. Pure.

Owner: the engine thread. Experts of one index were trained together, so what is held and swapped is a whole *path*, the
experts of that index in every layer, and a token whose path is not held takes another one, from its first layer to its
last. Who is held is decided once, by `VirtualExperts` over paths; the layers follow one after another, each giving the
path that leaves up as the newcomer arrives there, so that a swap needs room for the few loads under way and no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.swaps import Action, Release, SwapLimits
from expertd_engine.experts.virtual import VirtualExperts

_ROUNDING = 1e-6
"""Of a sum of probabilities."""


class VirtualPaths(VirtualExperts):
    """The held sets of all layers, which follow one choice of paths. `prior` ranks paths that no observation tells
    apart; one path at least is held, and one at a time is on its way, but for those that are at hand.
    """

    def __init__(self, prior: Sequence[float], layers: int, limits: SwapLimits) -> None:
        super().__init__([prior] * layers, 1, limits)
        self.stay = False
        """A step computes along the held paths, and none may go meanwhile."""
        self._whole: frozenset[int] | None = None
        """As `whole`, while no layer changes what it holds."""
        self._even: frozenset[int] | None = None
        """The chosen paths, while every layer holds these and no others."""
        self._paths = VirtualExperts([prior], 1, replace(limits, in_flight=1))

    def whole(self) -> frozenset[int]:
        """Paths that every layer holds."""
        if self._whole is None:
            self._whole = frozenset(set.intersection(*(layer.held for layer in self._layers)))
        return self._whole

    def score(self, layer: int, expert: int) -> float:
        """The path's, in all layers."""
        return self._paths.score(0, expert)

    def resize(self, slots: Sequence[int], at_hand: Iterable[ExpertId] = ()) -> list[Action]:
        """As for layers that choose for themselves; the fewest slots of a layer are the number of paths."""
        self._check_slots(slots)
        count = min(slots)
        near = Counter(path for _, path in at_hand)
        paths = [ExpertId(0, path) for path, layers in near.items() if layers == len(slots)]
        for layer in self._layers:
            layer.slots = count
        self._paths.resize([count], paths)
        coming = sorted(self._paths.to_be_held(0) - self._paths.held(0))
        for path in coming[: max(0, len(self._paths.to_be_held(0)) - count)]:  # or they would come all the same
            self._paths.failed(ExpertId(0, path))
        return self._follow()

    def stop(self) -> list[Action]:
        self._paths.stop()
        for layer in self._layers:
            layer.slots = 0
        return self._follow()

    def observe_paths(self, sums: Mapping[int, float]) -> None:
        """What tokens wanted of paths: sums over the tokens that go each path of how sure their router was of it."""
        self._paths.observe(0, sums)

    def end_step(self, tokens: float) -> list[Action]:
        """The step's observations are in: let a path come if it is worth it, then age all scores by `tokens`."""
        self._paths.end_step(tokens)
        return self._follow()

    def arrived(self, expert: ExpertId) -> list[Action]:
        number, path = expert
        self._leave(number, path)
        layer = self._layers[number]
        layer.held.add(path)
        layer.changed()
        self._moved()
        self.swaps[number] += len(layer.held) > layer.slots > 0
        return self._follow()

    def failed(self, expert: ExpertId) -> list[Action]:
        """The path cannot be whole now: another comes in its place; it may be chosen again once it has been observed
        anew."""
        self._leave(*expert)
        path = ExpertId(0, expert.expert)
        if self._paths.holds(0, [path.expert]):
            self._paths.lose(path)
        elif path.expert in self._paths.to_be_held(0):
            self._paths.failed(path)
        return self._follow()

    def _follow(self) -> list[Action]:
        """What brings the layers nearer to the chosen paths, the first layers first."""
        if self.stay:
            return []
        chosen = self._chosen()
        if chosen == self._even:
            return []
        actions: list[Action] = []
        for number, layer in enumerate(self._layers):
            if layer.held == chosen:
                continue
            spare = sorted(layer.held - chosen)[: max(0, len(layer.held) - layer.slots)]
            actions += [self._release(number, path) for path in spare]
            for path in sorted(chosen - layer.held - layer.coming.keys()):
                if self._loading < self.limits.in_flight:
                    actions.append(self._hold(number, path))
        if all(layer.held == chosen for layer in self._layers):
            self._even = chosen
        return actions

    def _release(self, number: int, expert: int) -> Release:
        self._moved()
        return super()._release(number, expert)

    def _moved(self) -> None:
        self._whole = self._even = None

    def _chosen(self) -> frozenset[int]:
        """The paths to hold, those that have become whole being counted among the held."""
        if not self.is_open:
            return frozenset()
        while there := (self._paths.to_be_held(0) - self._paths.held(0)) & self.whole():
            for path in there:
                self._paths.arrived(ExpertId(0, path))
        return self._paths.to_be_held(0)


@dataclass(frozen=True, slots=True)
class Served:
    """Who computes a token in the place of its own path. One path in all layers; or, where none is whole, one for each.

    `masses` goes with `paths`: what the router gave the paths that it would rather have taken in that layer.
    """

    paths: tuple[int, ...]
    masses: tuple[float, ...]

    def in_layer(self, layer: int) -> int:
        """The path whose expert computes there."""
        return self.paths[layer % len(self.paths)]


def serve(
    chances: Sequence[float], own: int, whole: Collection[int], held: Sequence[Collection[int]], limit: float
) -> Served | None:
    """Who computes a token that the router sends to `own`, which is not `whole`, having given every path its chance:
    the likeliest path that is; where none is, the one that most layers hold, with the likeliest of those `held` in the
    others. None: it keeps its own and waits, because no layer may lose more than `limit` of substituted mass.
    """
    if whole:
        paths: tuple[int, ...] = (_likeliest(whole, chances),)
    else:
        most = Counter(path for layer in held for path in layer)
        best = max(most, key=lambda path: (most[path], chances[path], -path))
        paths = tuple(best if best in layer else _likeliest(layer, chances) for layer in held)
    masses = tuple(0.0 if path == own else _above(chances, path) for path in paths)
    return Served(paths, masses) if limit >= 1 or max(masses) <= limit + _ROUNDING else None


def _likeliest(paths: Iterable[int], chances: Sequence[float]) -> int:
    return max(paths, key=lambda path: (chances[path], -path))


def _above(chances: Sequence[float], path: int) -> float:
    return sum(chance for chance in chances if chance > chances[path])
