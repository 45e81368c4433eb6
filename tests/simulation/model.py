"""A model that hashes all it reads into the next token, and the same model with everything in its place.

Each layer mixes a token's state with the keys of all positions before it, as found through the block table, then with
the content of every slot that its experts were said to lie in, in ascending order. Whatever is wrong, torn, stale or
out of order changes that token and all that follow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from expertd_engine.core import SampledToken, StepFailed, StepResult
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.held import HeldExperts
from expertd_engine.experts.leases import ExpertUnavailableError
from expertd_engine.messages import TokenLogprob
from expertd_engine.request import Sequence as EngineSequence
from expertd_engine.step_plan import Chunk, StepPlan
from simulation.device import UNIT, SimSlab, Violation, record_of

VOCAB = 24
EOS = 0

Content = Callable[[int, int], tuple[int, ...]]
"""What the slot of (layer, expert) holds."""


def mix(*values: object) -> int:
    """Integers and tuples of integers to one: the same in every process."""
    return hash(values)


@dataclass(frozen=True)
class Shape:
    """`experts[l]` experts of `pieces[l]` pieces each in layer l; every token chooses `top_k`, by itself alone."""

    experts: tuple[int, ...]
    pieces: tuple[int, ...]
    top_k: int
    seed: int

    @cached_property
    def routes(self) -> list[list[tuple[int, ...]]]:
        """By layer and token, ascending."""
        rng = Random(self.seed)
        return [
            [tuple(sorted(rng.sample(range(count), min(self.top_k, count)))) for _ in range(VOCAB)]
            for count in self.experts
        ]

    @cached_property
    def records(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """What a slot holds when all is well."""
        return {
            (layer, expert): record_of(ExpertId(layer, expert), self.pieces[layer])
            for layer, count in enumerate(self.experts)
            for expert in range(count)
        }

    @property
    def record_bytes(self) -> list[int]:
        return [pieces * UNIT for pieces in self.pieces]


def choose(state: int, banned: frozenset[int]) -> int:
    """The next token."""
    token = state % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def logprob_of(state: int) -> float:
    return -float(state % 1000)


class Reference:
    """The model with an infinite budget: one sequence, every record where it belongs."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._keys: list[list[int]] = [[] for _ in shape.experts]

    def next_state(self, token: int, position: int) -> int:
        """The state at the next position of the sequence, from which its next token is chosen."""
        shape, state = self._shape, mix(token, position)
        for layer, keys in enumerate(self._keys):
            keys.append(state)
            state = mix(state, tuple(keys))
            for expert in shape.routes[layer][token]:
                state = mix(state, expert, shape.records[layer, expert])
        return state


class SimRunner:
    """The `Forward` of the simulated engine: the runner's steps over simulated slots and keys."""

    def __init__(self, shape: Shape, cache: ExpertCache, slab: SimSlab, num_blocks: int, block_tokens: int) -> None:
        self.during: Callable[[StepPlan, int], None] = lambda plan, layer: None
        """Called in every layer, before its experts and while each is computed: may let time pass, may raise."""
        self.held: HeldExperts | None = None
        """Among these virtual steps route, if given; without, they are exact ones."""
        self.gave_up: list[frozenset[int]] = []
        """Sequences of each step that was given up."""
        self._shape, self._cache, self._slab = shape, cache, slab
        self._block_tokens = block_tokens
        self._keys = [[0] * (num_blocks * block_tokens) for _ in shape.experts]

    def __call__(self, plan: StepPlan) -> StepResult:
        tokens = [chunk.sequence.tokens(chunk.start, chunk.stop) for chunk in plan.chunks]
        self._cache.begin_step([token for row in tokens for token in row])
        failure, held = "", None
        try:
            held = self.held if self.held and plan.mode == "virtual" and self.held.begin_step() else None
            states = self._compute(plan, tokens, held)
        except (ExpertUnavailableError, MemoryError) as error:
            failure = str(error) or "no memory"
        if held is not None:
            held.end_step(plan.num_tokens / len(plan.chunks))
        elif self.held is not None and plan.mode == "exact":
            self.held.exact_step()
        counts = self._cache.end_step()
        if failure:
            self.gave_up.append(frozenset(chunk.sequence.sequence_id for chunk in plan.chunks))
            raise StepFailed((), failure)
        sampled, scored = {}, {}
        for chunk, row in zip(plan.chunks, states, strict=True):
            sequence = chunk.sequence
            if positions := chunk.prompt_logprob_positions:
                scored[sequence.sequence_id] = [_scored(sequence, p, row[p - chunk.start]) for p in positions]
            if chunk.samples:
                sampled[sequence.sequence_id] = SampledToken(choose(row[-1], sequence.banned_until_min()))
        return StepResult(sampled, 0.0, scored, counts)

    def _compute(self, plan: StepPlan, tokens: Sequence[Sequence[int]], held: HeldExperts | None) -> list[list[int]]:
        states = [
            [mix(token, chunk.start + i) for i, token in enumerate(row)]
            for chunk, row in zip(plan.chunks, tokens, strict=True)
        ]
        places = [self._places(chunk) for chunk in plan.chunks]
        for layer in range(len(self._shape.experts)):
            self.during(plan, layer)
            for chunk, row, where in zip(plan.chunks, states, places, strict=True):
                self._attend(layer, chunk, row, where)
            routes = self._shape.routes[layer] if held is None else self._reroute(layer, tokens, held)
            self._mix_experts(plan, layer, routes, tokens, states)
        return states

    def _places(self, chunk: Chunk) -> list[int]:
        """Where the keys of all positions up to the chunk's end lie."""
        table, size = chunk.sequence.block_table, self._block_tokens
        return [table[p // size] * size + p % size for p in range(chunk.stop)]

    def _attend(self, layer: int, chunk: Chunk, row: list[int], where: list[int]) -> None:
        keys = self._keys[layer]
        for index, state in enumerate(row):
            keys[where[chunk.start + index]] = state
        seen = tuple(keys[place] for place in where)
        for index, state in enumerate(row):
            row[index] = mix(state, seen[: chunk.start + index + 1])

    def _reroute(self, layer: int, tokens: Sequence[Sequence[int]], held: HeldExperts) -> list[tuple[int, ...]]:
        """Routes by token among the held experts; one token in four waits for its own."""
        own, there = self._shape.routes[layer], sorted(held.sets.held(layer))
        held.sets.observe(layer, Counter(expert for row in tokens for token in row for expert in own[token]))
        substituted = [
            tuple(there[(token + i) % len(there)] for i in range(len(route))) for token, route in enumerate(own)
        ]
        return [own[token] if token % 4 == 0 else tuple(sorted(set(substituted[token]))) for token in range(VOCAB)]

    def _mix_experts(
        self,
        plan: StepPlan,
        layer: int,
        routes: Sequence[tuple[int, ...]],
        tokens: Sequence[Sequence[int]],
        states: list[list[int]],
    ) -> None:
        chosen = {expert for row in tokens for token in row for expert in routes[token]}
        decoding = {
            expert
            for chunk, row in zip(plan.chunks, tokens, strict=True)
            if not chunk.is_prefill
            for token in row
            for expert in routes[token]
        }
        found = self._read_slots(plan, layer, sorted(chosen), chosen - decoding)
        for row, ids in zip(states, tokens, strict=True):
            for index, token in enumerate(ids):
                state = row[index]
                for expert in routes[token]:
                    state = mix(state, expert, found[expert])
                row[index] = state

    def _read_slots(
        self, plan: StepPlan, layer: int, experts: list[int], scanned: set[int]
    ) -> dict[int, tuple[int, ...]]:
        """The content of each expert's slot; where it changes while the expert computes, something else."""
        found: dict[int, tuple[int, ...]] = {}
        pieces = self._shape.pieces[layer]
        with self._cache.lease(layer, experts, scanned=scanned) as leases:
            while len(found) < len(experts):
                taken = leases.take()
                before = [(index, slot, self._slab.read(slot, pieces)) for index, slot in taken]
                self.during(plan, layer)
                for index, slot, content in before:
                    after = self._slab.read(slot, pieces)
                    found[experts[index]] = content if content == after else (*content, *after)
                    if plan.mode == "virtual" and found[experts[index]] != self._shape.records[layer, experts[index]]:
                        raise Violation(f"slot {slot} does not hold expert {experts[index]} of layer {layer}")
                leases.release([index for index, _ in taken])
        return found


def _scored(sequence: EngineSequence, position: int, state: int) -> TokenLogprob:
    return TokenLogprob(sequence.prompt_token_ids[position + 1], logprob_of(state), [])
