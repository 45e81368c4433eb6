"""Feeds an engine generated routes, and what a noisy channel lets it foresee of them. Owns where each stream stands.

`GeneratedRoutes` takes the place of the model's routers; `ChannelLookahead` is the engine's only view of what is still
to come, and says nothing that its channel does not carry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from expertd_engine.bench.channel import Channel
from expertd_engine.bench.routing import Ids, Routing, RoutingShape
from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import Exactness, Lookahead

_BLOCK_TOKENS = 256
_FEW = 32
"""Tokens of a step that is worth naming experts for before it begins: more use nearly all of them."""


class _Stream:
    """Routes and predictions of one stream, made in blocks before they are needed."""

    def __init__(self, routing: Routing, channel: Channel | None, number: int, streams: int) -> None:
        self._shape = routing.shape
        self._source = routing.stream(number, streams)
        self._channel = channel
        self._noise = np.random.default_rng([routing.seed, 4, number])
        self._routes: list[Ids] = []
        self._predicted: list[Ids] = []
        self.position = 0
        """Tokens routed so far."""

    def reserve(self, tokens: int) -> None:
        """Have `tokens` more tokens ready, so that none is made while a step is timed."""
        while len(self._routes) * _BLOCK_TOKENS < self.position + tokens:
            self._routes.append(self._source.take(_BLOCK_TOKENS))
            if self._channel is not None and not self._channel.at_once:
                self._predicted.append(self._channel.predict(self._routes[-1], self._shape.experts, self._noise))

    def routes(self, start: int, stop: int) -> Ids:
        """`[stop - start, layers, top_k]`"""
        self.reserve(max(0, stop - self.position))
        return _between(self._routes, start, stop)

    def predicted(self, start: int, stop: int) -> Ids:
        """`[stop - start, layers, leads, top_k]`"""
        self.reserve(max(0, stop - self.position))
        return _between(self._predicted, start, stop)


class Announced:
    """The tokens of one step, what they are routed to, and what is foreseen of them and of those after them."""

    def __init__(self, shape: RoutingShape, streams: Sequence[_Stream], rows: Sequence[tuple[int, int, int]]) -> None:
        """`rows`: stream, first and last + 1 token, in the order of the step's rows."""
        self._shape, self._streams, self._rows = shape, streams, rows
        parts = [streams[number].routes(start, stop) for number, start, stop in rows]
        self.routes: Ids = np.concatenate(parts) if parts else np.empty((0, shape.layers, shape.top_k), np.int64)
        """`[rows, layers, top_k]`"""
        self._experts: list[list[int]] | None = None
        """By layer, once they were asked for."""
        self._numbers: Ids | None = None
        self._predictions: dict[tuple[bool, int], list[list[list[int]]]] = {}
        """By token and layer: of the rows' own tokens (False) and of each stream's next (True), and by lead, where they
        were asked for."""

    def experts(self) -> list[list[int]]:
        """The distinct experts of each layer, ascending."""
        if self._experts is None:
            by_layer = self.routes.swapaxes(0, 1).reshape(self._shape.layers, -1)
            self._experts = [sorted(set(chosen)) for chosen in by_layer.tolist()]
        return self._experts

    def numbers(self) -> Ids:
        """Likewise in a row, expert e of layer l as `l * E + e`; nothing for a step of many tokens: that may use nearly
        all."""
        if self._numbers is None:
            few = self.routes if len(self.routes) <= _FEW else self.routes[:0]
            self._numbers = np.unique(few + self._shape.experts * np.arange(self._shape.layers)[:, None])
        return self._numbers

    def predicted(self, layer: int, lead: int, *, next_step: bool) -> list[int]:
        """What the channel gives, `lead` layers ahead, for `layer` of these tokens; or of the next token of each of
        their streams. Distinct, ascending.
        """
        tokens = self._predictions.get((next_step, lead))
        if tokens is None:
            tokens = self._predictions[next_step, lead] = self._predict(lead, next_step)
        return sorted({expert for token in tokens for expert in token[layer]})

    def _predict(self, lead: int, next_step: bool) -> list[list[list[int]]]:
        """`[tokens][layers][top_k]`, for all that `predicted` may be asked with this lead."""
        spans = [(number, stop, stop + 1) if next_step else (number, start, stop) for number, start, stop in self._rows]
        parts = (self._streams[number].predicted(start, stop) for number, start, stop in spans)
        return [token for part in parts for token in part[:, :, lead - 1].tolist()]


class GeneratedRoutes:
    """A `RouteSource`: tokens of a step are, in order, the next ones of the streams that `begin_step` names."""

    def __init__(self, routing: Routing, channel: Channel | None = None, streams: int = 1) -> None:
        self.shape: RoutingShape = routing.shape
        self._exact = channel is not None and channel.is_exact
        self._streams = [_Stream(routing, channel, number, streams) for number in range(streams)]
        self.announced = Announced(self.shape, self._streams, ())
        """The step last announced."""

    def become(self, other: GeneratedRoutes) -> None:
        """Go on as `other`, which is done with."""
        self.__dict__.update(other.__dict__)

    def reserve(self, tokens: int) -> None:
        """Have `tokens` more tokens of every stream ready."""
        for stream in self._streams:
            stream.reserve(tokens)

    def begin_step(self, rows: Sequence[tuple[int, int]]) -> None:
        """The step that comes next has these rows: `(stream, tokens)` in order. Its streams move on by as many
        tokens."""
        spans = []
        for number, count in rows:
            stream = self._streams[number]
            start, stream.position = stream.position, stream.position + count
            spans.append((number, start, stream.position))
        self.announced = Announced(self.shape, self._streams, spans)
        if self._exact:  # while the step is not timed yet: a pre-gating router has told by now
            self.announced.experts()
            self.announced.numbers()

    def route(self, layer: int, num_rows: int) -> Ids:
        """Expert ids `[num_rows, top_k]` for the running step. Raises ValueError for rows nobody announced."""
        return self.step_routes(num_rows)[:, layer]

    def step_routes(self, num_rows: int) -> Ids:
        """`[num_rows, layers, top_k]`, as `route`."""
        if num_rows != len(self.announced.routes):
            raise ValueError(f"the step has {num_rows} rows; {len(self.announced.routes)} were announced")
        return self.announced.routes

    def step_numbers(self) -> Ids:
        """`Announced.numbers` of the step last announced."""
        return self.announced.numbers()


class ChannelLookahead:
    """A `Lookahead` on generated routes: after layer l has routed, hints for the layers that the channel reaches; or
    before the first, for all of them.

    Past the last layer they go on with the first layers of each stream's next token. A prediction is repeated at every
    lead at which the channel still makes it; what is exact is said once.
    """

    def __init__(
        self, source: GeneratedRoutes, channel: Channel, slots_of: Callable[[int], Sequence[int]] | None = None
    ) -> None:
        """`slots_of(layer)[expert]` is negative for an absent expert: then those alone are named, as an engine's own
        predictors do."""
        self.exactness: Exactness = "exact" if channel.is_exact else "predicted"
        self._source = source
        self._slots_of = slots_of
        self._at_once = channel.at_once
        self._leads = min(len(channel.recalls), source.shape.layers)
        self._period = source.shape.layers * source.shape.experts
        self._told: dict[int, set[int]] = {}
        """Experts named at the latest lead, by the position at which their layer begins, in that order."""
        self._steps: dict[int, Announced] = {}
        """Those begun last: one may begin before the one before it has ended."""

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        self._steps = {one: told for one, told in self._steps.items() if one == step - 1} | {
            step: self._source.announced
        }
        if not self._at_once or not 0 < len(token_ids) <= _FEW:
            return ()
        begin, experts = step * self._period, self._source.shape.experts
        by_layer = self._source.announced.experts()
        self._told = {begin + layer * experts: set(one) for layer, one in enumerate(by_layer)}
        return [
            Hint(ExpertId(layer, expert), begin + layer * experts + expert)
            for layer, one in enumerate(by_layer)
            for expert in self._absent(layer, one)
        ]

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        shape, announced = self._source.shape, self._steps.get(step, self._source.announced)
        hints: list[Hint] = []
        now = step * self._period + layer * shape.experts
        while self._told and (passed := next(iter(self._told))) <= now:
            del self._told[passed]
        if self._at_once:
            return hints
        said = (next(reversed(self._told), now) - now) // shape.experts if self.exactness == "exact" else 0
        for lead in range(said + 1, self._leads + 1):
            ahead, target = divmod(layer + lead, shape.layers)
            named = self._absent(target, announced.predicted(target, self._known_at(lead), next_step=bool(ahead)))
            begin = now + lead * shape.experts
            hints += [Hint(ExpertId(target, expert), begin + expert) for expert in named]
            self._told[begin] = set(named)
        return hints

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        uses = (begin + expert.expert for begin, told in self._told.items() if expert.expert in told)
        layer = expert.layer * self._source.shape.experts
        return min((use for use in uses if use > after and use % self._period == layer + expert.expert), default=None)

    def _known_at(self, lead: int) -> int:
        """What is known at all is known at every lead."""
        return 1 if self.exactness == "exact" else lead

    def _absent(self, layer: int, experts: list[int]) -> list[int]:
        if self._slots_of is None:
            return experts
        slots = self._slots_of(layer)
        return [expert for expert in experts if slots[expert] < 0]


class Recorder:
    """A `Lookahead` that also keeps which experts each layer of the running step asked for."""

    def __init__(self, inner: Lookahead, shape: RoutingShape) -> None:
        self.exactness: Exactness = inner.exactness
        self._inner = inner
        self._shape = shape
        self._asked: dict[int, Sequence[int]] = {}

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        self._asked = {}
        return self._inner.begin_step(step, token_ids)

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        self._asked[layer] = experts
        return self._inner.routed(step, layer, experts)

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return self._inner.next_use(expert, after)

    def take_step(self) -> list[Sequence[int]]:
        """The experts that the last step asked for, by layer.

        An engine whose tokens choose every expert foresees by itself and never asks a lookahead: then all of them.
        """
        every = range(self._shape.experts) if self._shape.top_k == self._shape.experts else ()
        return [self._asked.get(layer, every) for layer in range(self._shape.layers)]


class Seen:
    """An onlooker that keeps which experts each layer of the running step asked for, of an engine that foresees for
    itself.
    """

    sees_hidden = False

    def __init__(self) -> None:
        self.chosen: list[Ids] = []
        """By layer, `[T, K]`, of the step just run."""

    def begin_step(self, streams: Sequence[int], decode: Sequence[bool]) -> bool:
        self.chosen = []
        return True

    def routed(self, layer: int, chosen: Ids, hidden: object) -> None:
        self.chosen.append(chosen.copy())

    def end_step(self, *, well: bool) -> None:
        return None

    def take_step(self) -> list[Sequence[int]]:
        """As `Recorder.take_step`."""
        return [np.unique(chosen).tolist() for chosen in self.chosen]


def _between(blocks: Sequence[Ids], start: int, stop: int) -> Ids:
    first, last = start // _BLOCK_TOKENS, (stop - 1) // _BLOCK_TOKENS
    joined = blocks[first] if first == last else np.concatenate(blocks[first : last + 1])
    return joined[start - first * _BLOCK_TOKENS : stop - first * _BLOCK_TOKENS]
