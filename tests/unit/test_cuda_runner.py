"""Steps launched behind others: the same tokens as if each had waited for the one before, whoever comes, ends or fails.

The device is a toy whose keys and values are the tokens themselves; it runs a launch when it is looked at, or before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from expertd_engine.core import EngineCore, StepFailed, StepResult
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.lead import CALM, Lead
from expertd_engine.kv_pool import KVPool
from expertd_engine.messages import Finished, Sampling, Submit, TextInput
from expertd_engine.model.cuda_model import DeviceModel, Running, StepOutcome, StepTokens
from expertd_engine.model.cuda_runner import DeviceRunner, nothing_follows
from expertd_engine.prefix_cache import PrefixCache
from expertd_engine.scheduler import Scheduler
from expertd_engine.sequence_stats import ExpertCounts
from expertd_engine.step_plan import SchedulerLimits, StepPlan

BLOCK, VOCABULARY, EOS, FEW = 4, 97, 7, 6


@dataclass(eq=False)
class Ended:
    """The mark of a launch; whoever looks at it lets the device go on."""

    world: World

    def done(self) -> bool:
        if self._is_past():
            return True
        self.world.advance()
        return self._is_past()

    def _is_past(self) -> bool:
        return all(mark is not self for mark, _ in self.world.given)

    def wait(self) -> None:
        while not self.done():
            pass


@dataclass
class World:
    """What the device has: keys and values, the tokens of its last launch, and launches that it has yet to run."""

    kv: dict[tuple[int, int], int] = field(default_factory=dict)
    brought: list[int] = field(default_factory=list)
    handed: list[list[int]] = field(default_factory=lambda: [[], []])
    given: list[tuple[Ended, Callable[[], None]]] = field(default_factory=list)

    def advance(self) -> None:
        """Run the first launch that has not run."""
        if self.given:
            _, run = self.given.pop(0)
            run()


class Model:
    """A `DeviceModel` of few rows."""

    def __init__(self, world: World) -> None:
        self._world, self._turn = world, 0
        self.launched: list[int] = []
        self.fails = 0
        """Launches that are refused from now on."""

    def is_small(self, tokens: StepTokens, experts: Cache) -> bool:
        return len(tokens.ids) <= FEW

    def step(self, tokens: StepTokens, experts: Cache) -> StepOutcome:
        assert not self._world.given, "a step of many rows runs alone"
        assert min(tokens.ids) >= 0
        self._run(tokens, 0)()
        return self._outcome(tokens, 0)

    def begin(self, tokens: StepTokens, experts: Cache) -> Running:
        if self.fails:
            self.fails -= 1
            raise MemoryError("as planted")
        experts.begun += 1
        assert experts.begun <= 2, "two at most are under way"
        self._turn = 1 - self._turn
        mark = Ended(self._world)
        self._world.given.append((mark, self._run(tokens, self._turn)))
        return Running(tokens, self._turn, None, mark)

    def wait(self, running: Running, meanwhile: Callable[[], None]) -> None:
        meanwhile()
        while not running.ended.done():
            meanwhile()

    def outcome(self, running: Running) -> StepOutcome:
        return self._outcome(running.tokens, running.turn)

    def _outcome(self, tokens: StepTokens, turn: int) -> StepOutcome:
        chosen = [self._world.handed[turn][row] for row in tokens.logit_rows]
        sure = 1e6 * torch.eye(VOCABULARY)
        return StepOutcome(chosen, {place: sure[chosen[place]] for place in tokens.read})

    def _run(self, tokens: StepTokens, turn: int) -> Callable[[], None]:
        """Inputs are taken when a launch is given: tables of blocks change later."""
        world, spans = self._world, [(span, list(span.blocks)) for span in tokens.spans]

        def run() -> None:
            ids = [world.brought[-1 - token] if token < 0 else token for token in tokens.ids]
            found = []
            for span, blocks in spans:
                for row in range(span.row, span.row + span.length):
                    position = tokens.positions[row]
                    world.kv[blocks[position // BLOCK], position % BLOCK] = ids[row]
                    history = [world.kv[blocks[p // BLOCK], p % BLOCK] for p in range(position + 1)]
                    draw = tokens.draws.get(row)
                    word = 0 if draw is None else draw.word
                    told = sum((p + 3) * token * token for p, token in enumerate(history)) % 1009
                    found.append((31 * told + word) % VOCABULARY)
            world.brought, world.handed[turn] = found, found

        return run


class Cache:
    """A `DeviceCache` whose launches near their end when they have been polled so often."""

    may_go_ahead = True

    def __init__(self, polls: int) -> None:
        self.lead = Lead(8)
        self.begun = self.ended = self._polled = 0
        self._polls = polls
        self.timed: list[bool] = []

    def begin_timed(self, rows: int | None, *, ahead: bool) -> None:
        if not ahead:
            self.timed.clear()
        self.timed.append(ahead)

    def end_timed(self, seconds: float | None, missed: int) -> None:
        self.timed.pop(0)

    def begin_step(self, token_ids: Sequence[int], scan: bool) -> None:
        assert all(token >= 0 for token in token_ids)

    def end_step(self) -> ExpertCounts:
        self.begun, self._polled = max(0, self.begun - 1), 0
        return ExpertCounts()

    def abandon_step(self) -> None:
        self.begun = 0

    def poll(self) -> None:
        self._polled += 1

    @property
    def nears_end(self) -> bool:
        return self._polled > self._polls

    def pump(self) -> None:
        assert self.begun == 0, "somebody still runs"


class Engine:
    """A core over the toy."""

    def __init__(self, polls: int, blocks: int, *, ahead: bool) -> None:
        self.world = World()
        self.model, self.cache = Model(self.world), Cache(polls)
        self.runner = DeviceRunner(cast(DeviceModel, self.model), cast(DeviceCache, self.cache))
        pool = KVPool(blocks, BLOCK)
        limits = SchedulerLimits(max_sequences=3, max_step_tokens=8, max_model_len=24)
        self.scheduler = Scheduler(limits, pool, PrefixCache(pool, "toy"))
        self.runner.look_ahead = self.scheduler.look_ahead if ahead else nothing_follows
        self.core = EngineCore(self.scheduler, self.forward, [EOS])
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, Finished] = {}
        self.steps: list[int] = []

    def forward(self, plan: StepPlan) -> StepResult:
        self.steps.append(plan.step)
        return self.runner(plan)

    def step(self) -> None:
        told = self.core.step(0.0)
        for output in told.outputs:
            self.tokens.setdefault(output.sequence_id, []).extend(output.token_ids)
        self.ended |= {finished.sequence_id: finished for finished in told.finished}
        self.scheduler.check()

    def run(self) -> None:
        while self.core.has_work:
            self.step()
        self.runner.idle()
        assert not self.world.given and self.cache.begun == 0 and not self.cache.timed


@dataclass(frozen=True)
class Asked:
    """A sequence that comes before some step, and how far it may go."""

    at: int
    prompt: list[int]
    sampling: Sampling
    aborted_after: int | None


SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    seed=st.integers(0, 3),
    logprobs=st.sampled_from([None, None, None, 0]),
    min_tokens=st.sampled_from([0, 0, 4]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=20),
)
ASKED = st.builds(
    Asked, st.integers(0, 12), st.lists(st.integers(8, 96), min_size=1, max_size=10), SAMPLINGS,
    st.sampled_from([None, None, 1, 3]),
)  # fmt: skip


def answered(asked: Sequence[Asked], polls: int, blocks: int, failing: int, *, ahead: bool) -> Engine:
    engine = Engine(polls, blocks, ahead=ahead)
    left, number = sorted(enumerate(asked), key=lambda one: one[1].at), 0
    while left or engine.core.has_work:
        while left and (left[0][1].at <= number or not engine.core.has_work):
            sequence_id, one = left.pop(0)
            engine.core.submit(Submit(sequence_id, [TextInput(one.prompt)], one.sampling), 0.0)
        for sequence_id, one in enumerate(asked):
            if one.aborted_after is not None and len(engine.tokens.get(sequence_id, ())) >= one.aborted_after:
                engine.core.abort([sequence_id], 0.0)
        engine.model.fails += number == failing
        engine.step()
        number += 1
    engine.run()
    assert len(set(engine.steps)) == len(engine.steps), "a step's number is its own"
    return engine


@settings(deadline=None, max_examples=150)
@given(st.lists(ASKED, min_size=1, max_size=5), st.integers(0, 3), st.integers(12, 40), st.integers(-1, 10))
def test_tokens_are_those_of_steps_that_wait(asked: Sequence[Asked], polls: int, blocks: int, failing: int) -> None:
    going, waiting = (answered(asked, polls, blocks, failing, ahead=ahead) for ahead in (True, False))
    assert waiting.runner.steps_ahead == 0
    for sequence_id, one in enumerate(asked):
        ours, theirs = going.tokens.get(sequence_id, []), waiting.tokens.get(sequence_id, [])
        if one.aborted_after is None:
            assert ours == theirs
            assert going.ended[sequence_id].reason == waiting.ended[sequence_id].reason
        else:  # it may have come a token further
            least = min(len(ours), len(theirs))
            assert ours[:least] == theirs[:least]


def one(engine: Engine, sequence_id: int, **sampling: Any) -> None:
    engine.core.submit(Submit(sequence_id, [TextInput([11, 12, 13])], Sampling(**sampling)), 0.0)


def test_all_but_the_first_step_of_an_answer_go_ahead_and_none_in_vain() -> None:
    engine = Engine(1, 40, ahead=True)
    one(engine, 1, max_tokens=10, temperature=1.0, ignore_eos=True)
    engine.run()
    assert len(engine.tokens[1]) == 10
    assert (engine.runner.steps_ahead, engine.runner.steps_in_vain) == (9, 0)


def test_a_step_for_sequences_that_have_all_ended_is_dropped_and_told() -> None:
    engine = Engine(1, 40, ahead=True)
    one(engine, 1, max_tokens=10, ignore_eos=True, stop_token_ids=list(range(VOCABULARY)))
    engine.run()
    assert len(engine.tokens[1]) == 1
    assert (engine.runner.steps_ahead, engine.runner.steps_in_vain) == (1, 1)
    one(engine, 2, max_tokens=4, ignore_eos=True)
    engine.run()
    assert len(engine.tokens[2]) == 4 and engine.runner.steps_in_vain == 1


def test_whoever_goes_on_keeps_its_own_token_when_another_ends() -> None:
    found = []
    for ahead in (True, False):
        engine = Engine(1, 40, ahead=ahead)
        one(engine, 1, max_tokens=10, ignore_eos=True, temperature=0.0, stop_token_ids=list(range(VOCABULARY)))
        one(engine, 2, max_tokens=10, ignore_eos=True, temperature=1.0)
        engine.run()
        assert engine.runner.is_ahead is False and len(engine.tokens[1]) == 1
        found.append(engine.tokens[2])
    assert found[0] == found[1]


def test_what_reads_logits_is_waited_for() -> None:
    engine = Engine(1, 40, ahead=True)
    one(engine, 1, max_tokens=6, ignore_eos=True, logprobs=0)
    one(engine, 2, max_tokens=6, ignore_eos=True)
    engine.run()
    assert engine.runner.steps_ahead == 0


def test_settling_waits_for_what_runs_and_loses_nothing() -> None:
    engine = Engine(0, 40, ahead=True)
    one(engine, 1, max_tokens=6, ignore_eos=True)
    engine.step()
    assert engine.runner.is_ahead and engine.world.given
    engine.runner.settle()
    assert engine.runner.is_ahead and not engine.world.given
    engine.run()
    assert len(engine.tokens[1]) == 6


def test_a_step_that_cannot_be_launched_ahead_fails_the_one_that_runs_and_both_are_tried_again() -> None:
    engine = Engine(1, 40, ahead=True)
    one(engine, 1, max_tokens=6, ignore_eos=True)
    engine.step()
    engine.model.fails = 1
    plan = cast(StepPlan, engine.scheduler.schedule())
    with pytest.raises(StepFailed, match="as planted"):
        engine.runner(plan)
    assert not engine.runner.is_ahead
    engine.scheduler.step_gave_up(plan)
    engine.run()
    plain = Engine(1, 40, ahead=False)
    one(plain, 1, max_tokens=6, ignore_eos=True)
    plain.run()
    assert engine.tokens == plain.tokens and len(engine.tokens[1]) == 6


def test_the_lead_is_as_long_as_the_host_needs() -> None:
    """Of 24 layers the host needs seven, then, on a busier box, eleven."""
    lead, late = Lead(24), []
    for step in range(40 * CALM):
        needed = 7 if step < 20 * CALM else 11
        late.append(lead.layers < needed)
        lead.launched(late=late[-1])
    assert late[:5] == [True] * 4 + [False] and sum(late[: 20 * CALM]) < 25
    assert lead.layers in (10, 11, 12) and sum(late[20 * CALM :]) < 25
    for _ in range(100):
        lead.launched(late=True)
    assert lead.layers == 24
