"""The scheduler's small world, exhaustively: two or three sequences, room for one, and at every step every event.

Each world is a tape of choices. A run reads the tape, takes choice 0 past its end, and notes how many choices there
were at each place; the next tape is the successor in counting order, until none is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from expertd_engine.core import EngineCore, StepFailed
from expertd_engine.kv_pool import KVPool
from expertd_engine.messages import ExpertMode, Submit
from expertd_engine.step_plan import StepPlan
from support.builders_core import HashForward, Told, make_core, make_scheduler, make_submit, run_alone

MAX_STEPS = 40
EVENTFUL_STEPS = 12
"""Nothing but `done` happens later, so every world must come to its end."""


@dataclass
class Tape:
    """Choices to replay, and the choices met: (taken, number of options)."""

    choices: list[int] = field(default_factory=list)
    met: list[tuple[int, int]] = field(default_factory=list)

    def choose(self, num_options: int) -> int:
        place = len(self.met)
        taken = self.choices[place] if place < len(self.choices) else 0
        self.met.append((taken, num_options))
        return taken

    def successor(self) -> list[int] | None:
        met = list(self.met)
        while met:
            taken, num_options = met.pop()
            if taken + 1 < num_options:
                return [choice for choice, _ in met] + [taken + 1]
        return None


@dataclass
class World:
    """The first sequence arrives before step 0, the others before 0, 1 or 2; then one event between and in steps."""

    tape: Tape
    messages: list[Submit]
    prefix_cache: bool
    core: EngineCore = field(init=False)
    told: Told = field(default_factory=Told)
    submitted: set[int] = field(default_factory=set)
    ended: dict[int, str] = field(default_factory=dict)
    """Those ended by an event, and the reason they must give."""
    step: int = 0

    def __post_init__(self) -> None:
        scheduler = make_scheduler(
            num_blocks=5, block_tokens=2, max_sequences=2, max_step_tokens=3, max_model_len=9, max_mode_steps=1,
            prefix_cache=self.prefix_cache,
        )  # fmt: skip
        self.core = make_core(scheduler, HashForward(2, before=self.in_flight))

    def run(self) -> None:
        others_arrive = self.tape.choose(3)
        self.submit(self.messages[:1])
        while self.core.has_work or self.step <= others_arrive:
            assert self.step < MAX_STEPS, f"no end in sight: {self.tape.met}"
            if self.step == others_arrive:
                self.submit(self.messages[1:])
            self.between_steps()
            self.told.take(self.core.step(self.step))
            self.core.scheduler.check()
            self.step += 1

    def submit(self, messages: list[Submit]) -> None:
        for message in messages:
            self.core.submit(message, self.step)
            self.submitted.add(message.sequence_id)

    def live(self) -> list[int]:
        return sorted(self.submitted - self.told.finished.keys() - self.ended.keys())

    def between_steps(self) -> None:
        """nothing | abort one"""
        if self.step < EVENTFUL_STEPS:
            chosen = self.tape.choose(1 + len(self.live()))
            self.abort(self.live()[:chosen][-1:])

    def in_flight(self, plan: StepPlan) -> None:
        """done | abort one, in the plan or not | fail one of the plan | fail all of it"""
        assert_writes_are_private(plan, self.core.scheduler.pool)
        if self.step >= EVENTFUL_STEPS:
            return
        rows = [chunk.sequence.sequence_id for chunk in plan.chunks]
        aborts = [[sequence_id] for sequence_id in self.live()]
        failures = [[row] for row in rows] + ([rows] if len(rows) > 1 else [])
        chosen = self.tape.choose(1 + len(aborts) + len(failures))
        if 1 <= chosen <= len(aborts):
            self.abort(aborts[chosen - 1])
        elif chosen:
            failing = failures[chosen - 1 - len(aborts)]
            self.ended |= dict.fromkeys(failing, "error")
            raise StepFailed(failing, "chosen")

    def abort(self, sequence_ids: list[int]) -> None:
        self.core.abort(sequence_ids, self.step)
        self.ended |= dict.fromkeys(sequence_ids, "abort")


def assert_writes_are_private(plan: StepPlan, pool: KVPool) -> None:
    """No step writes to a block that another sequence holds or may yet find."""
    for chunk in plan.chunks:
        for position in range(chunk.start, chunk.stop):
            block = chunk.sequence.block_table[position // pool.block_tokens]
            assert pool.references[block] == 1 and not pool.is_published(block)


def worlds(messages: list[Submit], prefix_cache: bool) -> Iterator[World]:
    choices: list[int] | None = []
    while choices is not None:
        world = World(Tape(choices), messages, prefix_cache)
        world.run()
        yield world
        choices = world.tape.successor()


def long_lived(sequence_id: int, priority: int = 0, mode: ExpertMode = "exact") -> Submit:
    """May come to fill the pool alone: four blocks of two tokens for eight computed ones."""
    return make_submit(sequence_id, [5, 6, 7], max_tokens=6, ignore_eos=True, priority=priority, mode=mode)


def short_lived(sequence_id: int, priority: int = 0, mode: ExpertMode = "exact") -> Submit:
    return make_submit(sequence_id, [8, 9], max_tokens=2, ignore_eos=True, priority=priority, mode=mode)


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["computing-all", "prefix-cache"])
@pytest.mark.parametrize(
    "messages",
    [
        [long_lived(1), long_lived(2)],
        [long_lived(1), long_lived(2, priority=-1)],
        [long_lived(1), long_lived(2, mode="virtual")],
        [long_lived(1), long_lived(2, mode="virtual"), short_lived(3, priority=-1)],
    ],
    ids=["same", "second-first", "two-modes", "three"],
)
def test_every_world_ends_each_sequence_once_and_leaks_nothing(messages: list[Submit], prefix_cache: bool) -> None:
    alone = {message.sequence_id: run_alone(message).tokens[message.sequence_id] for message in messages}
    num_preemptions = num_hit = 0
    for world in worlds(messages, prefix_cache):
        scheduler = world.core.scheduler
        num_preemptions += scheduler.num_preemptions
        num_hit += scheduler.prefixes.num_hit if scheduler.prefixes is not None else 0
        choices, told = world.tape.met, world.told
        assert told.reasons() == dict.fromkeys(alone, "length") | world.ended, choices
        for sequence_id, tokens in told.tokens.items():
            whole = alone[sequence_id]
            assert tokens == (whole[: len(tokens)] if sequence_id in world.ended else whole), choices
        assert world.core.scheduler.pool.used_blocks == 0, choices
    assert num_preemptions > 100  # the worlds are cramped enough to mean something
    several_exact = sum(message.mode == "exact" for message in messages) > 1
    assert (num_hit > 100) == (prefix_cache and several_exact)
