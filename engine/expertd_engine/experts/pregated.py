"""Exact lookahead from routes that are known before their step: a model whose router reads tokens alone. Pure.

Named are the experts of the step that begins, in the order of their uses, for prefetch layer by layer; and the next use
of every resident expert by tokens that wait: of sequences that are passed over, of prompts. What a step samples is
routed before the next one begins, so nothing known is ever left out; until then it is believed to use the experts of
the token before, which tells who had better stay, loads nothing, and is the only guess made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import Exactness
from expertd_engine.paths import Union, join
from expertd_engine.step_plan import StepPlan

_STEPS_AHEAD = 4
"""How far what waits is told, in full steps."""


class PregatedLookahead:
    """`plan` is called before `begin_step`; heads are as in `Paths`: one for all layers, or one a layer."""

    exactness: Exactness = "exact"

    def __init__(self, num_layers: int, num_experts: int, slots: Callable[[int], Sequence[int]]) -> None:
        """`slots(layer)` is the slot of each expert of a layer, -1 where it is not resident."""
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._slots = slots
        self._now: Union = ()
        self._later: Iterable[tuple[int, Union]] = ()
        self._next: dict[ExpertId, int] = {}
        self.lacks = False
        """Whether an expert of the running step was not resident when it began."""

    def plan(self, now: Union, later: Iterable[tuple[int, Union]]) -> None:
        """The next step uses `now`; tokens that wait use `later`, so many steps ahead (at least one), in order, which
        is asked for only if the step lacks an expert."""
        self._now, self._later = now, later

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        """The step's own uses, to be read ahead; and later uses of what is resident, which say who had better stay.
        Nothing where all is resident: then nobody gives way either."""
        wanted = list(self._of(self._now))
        self.lacks = not all(map(self._is_resident, wanted))
        self._next = {}
        if not self.lacks:
            return ()
        for ahead, union in self._later:
            for expert in self._of(union):
                self._next.setdefault(expert, self._position(step + ahead, expert))
        hints = [Hint(expert, self._position(step, expert)) for expert in wanted]
        kept = [(at, expert) for expert, at in self._next.items() if self._is_resident(expert)]
        return hints + [Hint(expert, at) for at, expert in sorted(kept)]

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        """All was said before the step."""
        return ()

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        at = self._next.get(expert)
        return at if at is not None and at > after else None

    def _is_resident(self, expert: ExpertId) -> bool:
        return self._slots(expert.layer)[expert.expert] >= 0

    def _of(self, union: Union) -> Iterable[ExpertId]:
        """By layer, then expert; empty for the empty union."""
        for layer in range(self._num_layers if union else 0):
            for expert in sorted(union[layer if len(union) > 1 else 0]):
                yield ExpertId(layer, expert)

    def _position(self, step: int, expert: ExpertId) -> int:
        return (step * self._num_layers + expert.layer) * self._num_experts + expert.expert


def step_union(plan: StepPlan) -> Union:
    """What the plan's tokens use. Their paths are known."""
    return join(chunk.sequence.paths.union(chunk.start, chunk.stop) for chunk in plan.chunks if chunk.sequence.paths)


def later_unions(plan: StepPlan, step_tokens: int) -> Iterator[tuple[int, Union]]:
    """What is used after the plan's step, and in how many steps: in the next one by the plan's own sequences, whose
    tokens yet to come are believed to go where the ones before them went; then by all that waits, in its order."""
    stops = {chunk.sequence.sequence_id: chunk.stop for chunk in plan.chunks}
    last = [chunk.sequence.paths.union(chunk.stop - 1, chunk.stop) for chunk in plan.chunks if chunk.sequence.paths]
    yield 1, join(last)
    tokens = 0
    for sequence in plan.queue:
        start = stops.get(sequence.sequence_id, sequence.num_computed_tokens)
        stop = min(sequence.num_tokens, start + step_tokens)
        if sequence.paths is None or start >= stop:
            continue
        yield 2 + tokens // step_tokens, sequence.paths.union(start, stop)
        tokens += stop - start
        if tokens >= _STEPS_AHEAD * step_tokens:
            break
