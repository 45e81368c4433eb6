"""The expert cache over a real ledger, slab and transfer threads: what a step gets, and that no lease outlives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pytest

from expertd_engine.errors import BudgetError, StoreError
from expertd_engine.experts.accounting import MIN_WINDOW
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.events import Event, ExpertId, Hint, Instruction, Loaded
from expertd_engine.experts.governor import Governor
from expertd_engine.experts.leases import ExpertUnavailableError
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.lookahead import EveryExpert, Exactness, Lookahead, NoLookahead
from expertd_engine.experts.policy import make_policy
from expertd_engine.experts.slab import PAGE, Slab
from expertd_engine.experts.transfer import Transfers
from support.calls import calls_of

LAYERS, EXPERTS = 3, 8


class Records:
    """Record of (layer, expert): that many bytes of `16 × layer + expert`. Those in `bad` cannot be read."""

    def __init__(self) -> None:
        self.bad: set[ExpertId] = set()

    def read_record(self, expert: ExpertId, buffer: memoryview) -> None:
        if expert in self.bad:
            raise StoreError("torn")
        buffer[:] = bytes([16 * expert.layer + expert.expert]) * len(buffer)

    def place_of(self, expert: ExpertId) -> None:
        """Each by itself."""


class World:
    def __init__(self, slots: int, policy: str = "lru", lookahead: Lookahead | None = None, depth: int = 4) -> None:
        self.records = Records()
        self.ledger = Ledger(
            [PAGE] * LAYERS,
            [EXPERTS] * LAYERS,
            slots * PAGE,
            make_policy(policy),
            max_budget_bytes=LAYERS * EXPERTS * PAGE,
            prefetch=lookahead is not None,
            prefetch_depth=depth,
        )
        self.slab = Slab(self.ledger.num_slots, PAGE)
        transfers = Transfers(self.records, threads=2)
        self.cache = ExpertCache(self.ledger, self.slab, transfers, lookahead or NoLookahead(), [PAGE] * LAYERS)

    def use(self, layer: int, experts: Sequence[int], *, scan: bool = False) -> None:
        """Lease each and check that the slot holds its record, and is leased, at that moment."""
        seen: list[int] = []
        with self.cache.lease(layer, experts, scanned=experts if scan else ()) as leases:
            while len(seen) < len(experts):
                for index, slot in leases.take():
                    seen.append(experts[index])
                    assert set(self.slab.view(slot, PAGE)) == {16 * layer + experts[index]}
                    assert self.ledger.state(ExpertId(layer, experts[index])) == "leased"
                    leases.release([index])
        assert sorted(seen) == list(experts)

    def settle(self) -> None:
        """Wait for all loads under way, then check the ledger's laws and that no lease is left."""
        while self.ledger.loading_bytes:
            self.cache.handle([self.cache.transfers.completions.get(timeout=10)])
        self.ledger.check()
        states = [self.ledger.state(ExpertId(layer, e)) for layer in range(LAYERS) for e in range(EXPERTS)]
        assert "leased" not in states and not self.cache._leases


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.cache.close()


@pytest.mark.parametrize("slots", [2, 3, 8, 24])
@pytest.mark.parametrize("foreseen", [False, True])
def test_every_expert_is_right_at_any_budget(worlds: list[World], slots: int, foreseen: bool) -> None:
    lookahead = EveryExpert(LAYERS, EXPERTS, 4) if foreseen else None
    worlds.append(world := World(slots, "next-use" if foreseen else "lru", lookahead))
    lookups = 0
    for _ in range(3):
        world.cache.begin_step([1])
        for layer in range(LAYERS):
            world.use(layer, range(EXPERTS))
        stats = world.cache.end_step()
        lookups += stats.hits + stats.late + stats.misses
        assert stats.hits + stats.late + stats.misses == LAYERS * EXPERTS
    world.settle()
    assert world.ledger.peak_bytes <= slots * PAGE
    assert lookups == world.ledger.counters.lookups()
    if slots == LAYERS * EXPERTS:
        assert stats.hits == LAYERS * EXPERTS and stats.loaded_bytes == 0


def test_a_step_reports_its_own_numbers(worlds: list[World]) -> None:
    worlds.append(world := World(8))
    world.cache.begin_step([1])
    world.use(0, [1, 2, 5])
    first = world.cache.end_step()
    assert (first.hits, first.late, first.misses, first.loaded_bytes) == (0, 0, 3, 3 * PAGE)
    assert first.stall_s > 0
    world.cache.begin_step([1])
    world.use(0, [1, 2, 5, 6])
    second = world.cache.end_step()
    assert (second.hits, second.late, second.misses, second.loaded_bytes) == (3, 0, 1, PAGE)
    assert world.cache.stalls.total_s == pytest.approx(first.stall_s + second.stall_s)


def test_few_leases_are_held_at_once(worlds: list[World]) -> None:
    worlds.append(world := World(24))
    world.cache.begin_step([1])
    with world.cache.lease(0, range(EXPERTS)) as leases:
        held = [index for index, _ in leases.take()]
        assert world.ledger.counters.lookups() == MIN_WINDOW
        leases.release(held)
        assert world.ledger.counters.lookups() == min(EXPERTS, MIN_WINDOW + len(held))


@pytest.mark.parametrize("slots", [2, 4, 24])
@pytest.mark.parametrize("taken", [0, 1, 3, 8])
def test_leases_end_with_a_step_that_is_given_up(worlds: list[World], slots: int, taken: int) -> None:
    worlds.append(world := World(slots))
    world.cache.begin_step([1])
    with world.cache.lease(0, range(EXPERTS)) as leases:
        done = 0
        while done < taken:
            for index, _ in leases.take():
                leases.release([index])
                done += 1
    world.cache.end_step()
    world.settle()
    world.cache.begin_step([1])
    world.use(1, range(EXPERTS))
    world.cache.end_step()
    world.settle()
    counters = world.ledger.counters
    assert counters.hits[1] + counters.late[1] + counters.misses[1] == EXPERTS, "the next step is a whole one"


@pytest.mark.parametrize("slots", [2, 4, 24])
@pytest.mark.parametrize("bad", [0, 3, 7])
def test_a_record_that_cannot_be_read_fails_the_step_and_nothing_else(
    worlds: list[World], slots: int, bad: int
) -> None:
    worlds.append(world := World(slots))
    world.records.bad.add(ExpertId(1, bad))
    world.cache.begin_step([1])
    world.use(0, range(EXPERTS))
    with pytest.raises(ExpertUnavailableError, match=f"expert {bad} of MoE layer 1 cannot be loaded: StoreError: torn"):
        world.use(1, range(EXPERTS))
    world.cache.end_step()
    world.settle()
    assert world.ledger.counters.load_failures >= 2  # tried once more
    world.records.bad.clear()
    world.cache.begin_step([1])
    for layer in range(LAYERS):
        world.use(layer, range(EXPERTS))
    world.cache.end_step()
    world.settle()


def test_what_is_foreseen_is_loaded_before_it_is_asked_for(worlds: list[World]) -> None:
    worlds.append(world := World(24, "next-use", EveryExpert(LAYERS, EXPERTS, 4)))
    world.cache.begin_step([1])
    while world.ledger.loading_bytes:
        world.cache.handle([world.cache.transfers.completions.get(timeout=10)])
    assert world.ledger.counters.prefetch_loads >= 4
    world.use(0, range(EXPERTS))
    assert world.cache.end_step().hits >= 4


def test_a_lowered_budget_returns_memory_and_a_raised_one_is_used(worlds: list[World]) -> None:
    worlds.append(world := World(24))
    for budget, expected in ((24, 24), (6, 6), (12, 12)):
        world.cache.set_budget(budget * PAGE)
        world.cache.begin_step([1])
        for layer in range(LAYERS):
            world.use(layer, range(EXPERTS))
        world.cache.end_step()
        world.settle()
        assert world.ledger.resident_bytes == expected * PAGE
    with pytest.raises(BudgetError):
        world.cache.set_budget(PAGE)
    assert world.ledger.budget_bytes == 12 * PAGE


class Wrong(NoLookahead):
    """After layer 0 it names the first four experts of layer 1."""

    exactness: Exactness = "predicted"

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        begin = (step * LAYERS + 1) * EXPERTS
        return [Hint(ExpertId(1, expert), begin + expert) for expert in range(4)] if layer == 0 else ()


def test_what_was_predicted_of_a_layer_and_did_not_come_is_given_up_with_that_layer(worlds: list[World]) -> None:
    world = World(12, lookahead=Wrong())
    worlds.append(world)
    world.cache.begin_step([0])
    world.use(0, [0])
    world.use(1, [3])
    world.use(2, [0])
    world.settle()
    counters = world.ledger.counters
    assert counters.prefetch_issued == 4 and counters.prefetch_used + counters.prefetch_late <= 1
    assert world.ledger.state(ExpertId(1, 3)) == "resident"


ASKED = ("lookahead", "governor", "payoff", "waste")
"""Modules of who is asked what comes."""


@dataclass
class Noted:
    """The ledger's `handle_all`, and all that it is told but when reads end."""

    handle: Callable[[Iterable[Event]], list[Instruction]]
    told: list[Event]

    def __call__(self, events: Iterable[Event]) -> list[Instruction]:
        events = list(events)
        self.told += [event for event in events if not isinstance(event, Loaded)]
        return self.handle(events)


def test_while_predictions_do_not_pay_a_step_goes_as_if_nobody_made_any(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the engine's calls those that wait for loads depend on chance: those to whom it asks are compared, and all
    that the ledger is told."""
    governor = Governor(Wrong(), lambda expert: None, LAYERS, EXPERTS, LAYERS)
    governor.payoff.is_on = False
    told: list[list[Event]] = []
    asked: list[Counter[tuple[str, str]]] = []

    def step(world: World) -> None:
        world.cache.begin_step([0])
        for layer in range(LAYERS):
            world.use(layer, [0, 3])
        world.cache.end_step()

    for lookahead in (NoLookahead(), governor):
        worlds.append(world := World(12, lookahead=lookahead))
        told.append([])
        monkeypatch.setattr(world.ledger, "handle_all", Noted(world.ledger.handle_all, told[-1]))
        calls = calls_of(partial(step, world), "expertd_engine.experts")
        asked.append(Counter({call: n for call, n in calls.items() if call[0].endswith(ASKED)}))
        assert not world.cache.foresees
    assert told[0] == told[1] and told[0]
    assert asked[0] == asked[1] and asked[0]
