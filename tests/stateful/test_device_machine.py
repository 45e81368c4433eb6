"""Random histories of a device's expert cache on a device that lets the test decide what is done when.

Whatever the order, no step reads a slot in which anything else is, or is being written; and at rest the table says of
every expert where it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import cast

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_columns import uses_of
from expertd_engine.experts.device_events import COMPUTED, HIT, SHARED, WAITED
from expertd_engine.experts.device_held import DeviceHeld
from expertd_engine.experts.device_host import HostTier
from expertd_engine.experts.device_host_compute import HostCompute
from expertd_engine.experts.device_layout import HOME
from expertd_engine.experts.device_ledger import DeviceLedger
from expertd_engine.experts.device_plans import nothing_known
from expertd_engine.experts.device_pool import ChunkPlan
from expertd_engine.experts.device_staging import Chunk
from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import Exactness
from expertd_engine.experts.policy import make_policy
from expertd_engine.experts.residency import State
from expertd_engine.experts.swaps import SwapLimits
from expertd_engine.experts.virtual import VirtualExperts
from expertd_engine.experts.virtual_room import VirtualRoom
from support.fake_device import RECORD, FakeDevice, FakeStep, Records, content, index_of

LAYERS, EXPERTS = 2, 6
SHARED_BYTES = RECORD // 3
ALL = [ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
LIMITS = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

ROUTES = st.tuples(*[st.dictionaries(st.integers(0, EXPERTS - 1), st.integers(1, 3), min_size=1)] * LAYERS)
Foreseen = tuple[int, ExpertId]
"""In how many steps, and who."""
FORESEEN = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(ALL)), max_size=6)


class Told:
    """Foresees what the test tells it."""

    exactness: Exactness = "predicted"

    def __init__(self) -> None:
        self.next: list[tuple[int, ExpertId]] = []

    def begin_step(self, step: int, token_ids: Sequence[int]) -> list[Hint]:
        return self._hints(step)

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> list[Hint]:
        return self._hints(step)

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return None

    def _hints(self, step: int) -> list[Hint]:
        told, self.next = self.next, []
        first = step * LAYERS * EXPERTS
        return [Hint(e, first + ahead * LAYERS * EXPERTS + e.layer * EXPERTS + e.expert) for ahead, e in told]


class Idle:
    """A processor that computes nothing: the device's step says what was left to it."""

    computed = computed_bytes = 0
    sharing = None

    def shared_bytes(self, layer: int, cut: int) -> int:
        return SHARED_BYTES

    def __init__(self, lands: bool) -> None:
        self.lands = lands

    def begin_step(self, *, may_ask: bool) -> bool:
        return may_ask

    def launched(self) -> None:
        return None

    def end_step(self) -> float:
        return 0.0

    def give_up(self) -> None:
        return None

    def close(self) -> None:
        return None


class DeviceMachine(RuleBasedStateMachine):
    """Steps of two layers of six experts over a few slots in chunks of three."""

    left: Callable[[int], tuple[int, bool]] | None = None
    """Of n missing experts, how many the processor computes, and whether a part of one more; None: there is none that
    computes."""
    lands = True
    """Whether steps bring in anything themselves."""

    @initialize(
        slots=st.integers(2, len(ALL) - 2),
        policy=st.sampled_from(["lru", "next-use"]),
        depth=st.integers(1, 4),
        knows=st.booleans(),
        ahead=st.booleans(),
    )
    def start(self, slots: int, policy: str, depth: int, knows: bool, ahead: bool) -> None:
        self.device = FakeDevice()
        self.told = Told()
        index = index_of(LAYERS, EXPERTS, top_k=2)
        host = HostTier(index, self.device, available=2**30)
        host.fill(Records(), threads=1, report=lambda fraction: None)
        counts, ranks = [EXPERTS] * LAYERS, make_policy(policy)
        ledger = DeviceLedger(
            [RECORD] * LAYERS, counts, ChunkPlan(RECORD, 3, RECORD), slots * RECORD, ranks,
            max_budget_bytes=len(ALL) * RECORD, prefetch_depth=depth, uses=uses_of(counts, ranks),
        )  # fmt: skip
        self.cache = DeviceCache(index, self.device, host, ledger, self.told, EXPERTS)
        if self.left is not None:
            self.cache.computing = cast(HostCompute, Idle(self.lands))
            self.cache.ledger.brings_in = True
        if knows:
            self.cache.routes = lambda: lambda layer: ()
        self.cache.plans.launches_ahead = ahead
        self.lookups = 0
        self.running: list[FakeStep] = []
        """Launched, the first one first, and not said to have ended: two at most."""

    # ------------------------------------------------------------ steps

    @rule(
        steps=st.lists(
            st.tuples(ROUTES, FORESEEN, st.integers(0, 12), st.integers(0, 6), st.booleans()), min_size=1, max_size=6
        )
    )
    def launch(self, steps: Sequence[tuple[Sequence[dict[int, int]], list[Foreseen], int, int, bool]]) -> None:
        """Also while the one before still runs: then the host is a step ahead, unless it knows what the step uses, and
        waits."""
        for routes, foreseen, computed, copied, known in steps:
            self._end(1)
            self.told.next = sorted(foreseen)
            step = self._begin(routes, scan=copied == 1, known=known)
            step.give(self.device.lanes[0])
            self.cache.after_launch()
            self.running.append(step)
            self.advance(1, copied)
            self.advance(0, computed)
            self.cache.poll()

    @rule(routes=ROUTES, after=st.integers(-1, LAYERS - 1), known=st.booleans())
    def fail(self, routes: Sequence[dict[int, int]], after: int, known: bool) -> None:
        """After some layers, the last of which has not written what it landed; or before anything was launched."""
        self._end(1)
        self.cache.settle()
        self.running.clear()
        step = self._begin(routes, False, known)
        step.fails_after = after
        if after >= 0:
            step.give(self.device.lanes[0])
            self.lookups += sum(len(chosen) for chosen in routes[: after + 1])
        self.lookups -= sum(map(len, routes))
        self.cache.abandon_step()

    @precondition(lambda self: self.running)
    @rule()
    def finish(self) -> None:
        """The first of those that run has ended."""
        counts = self.cache.end_step()
        sources = [source for _, source in self.running.pop(0).met]
        expected = (sources.count(HIT), sources.count(WAITED))
        assert (counts.hits, counts.late) == expected and counts.misses == len(sources) - sum(expected)
        over_link = counts.misses - sources.count(COMPUTED) - sources.count(SHARED)
        assert counts.loaded_bytes == RECORD * over_link + SHARED_BYTES * sources.count(SHARED)

    def _end(self, but: int) -> None:
        while len(self.running) > but:
            self.finish()

    @rule(routes=ROUTES, computed=st.integers(0, 2), copied=st.integers(0, 9))
    def prefill(self, routes: Sequence[dict[int, int]], computed: int, copied: int) -> None:
        """Every expert of every layer comes by, once, and is there while it is read."""
        self._end(0)
        self.cache.begin_step((), scan=True)
        compute = self.device.lanes[0]
        with self.cache.stage() as staging:
            for layer in range(LAYERS):
                met: list[int] = []
                for chunk in chain((staging.resident(layer),), staging.chunks(layer, torch.empty(0))):
                    compute.run(partial(self._read, layer, chunk))
                    met += chunk.indices
                    self.advance(0, computed)
                    self.advance(1, copied)
                assert sorted(met) == list(range(EXPERTS))
        compute.mark().wait()
        self.cache.scanned([[chosen.get(expert, 0) for expert in range(EXPERTS)] for chosen in routes])
        self.lookups += sum(map(len, routes))
        assert self.cache.end_step().misses + self.cache.end_step().hits == sum(map(len, routes))

    def _begin(self, routes: Sequence[dict[int, int]], scan: bool, known: bool) -> FakeStep:
        self.lookups += sum(map(len, routes))
        numbers = [layer * EXPERTS + expert for layer, chosen in enumerate(routes) for expert in sorted(chosen)]
        self.cache.foreknown = lambda: np.array(numbers if known else [], np.int64)
        self.cache.begin_step((), scan)
        self.cache.foreknown = nothing_known
        self.cache.before_launch()
        table = self.cache.table
        assert self.lands or int(table.tail) == int(table.head), "slots are handed to steps that land nothing"
        return FakeStep(table, routes, self.left or (lambda missing: (0, False)))

    def _read(self, layer: int, chunk: Chunk) -> None:
        for expert, address in zip(chunk.experts.tolist(), chunk.addresses.tolist(), strict=True):
            assert ctypes.string_at(address, RECORD) == content(ExpertId(layer, expert)), "two phases: a torn prefill"

    # ------------------------------------------------------------ what happens meanwhile

    @rule(foreseen=FORESEEN)
    def tell(self, foreseen: list[Foreseen]) -> None:
        self.told.next = sorted(foreseen)

    @rule(lane=st.integers(0, 1), pieces=st.integers(1, 8))
    def advance(self, lane: int, pieces: int) -> None:
        for _ in range(pieces):
            self.device.lanes[lane].advance()

    @rule()
    def poll(self) -> None:
        self.cache.poll()

    @rule()
    def fill(self) -> None:
        self.cache.settle()
        self.cache.fill()

    @rule(slots=st.integers(2, len(ALL)))
    def set_budget(self, slots: int) -> None:
        self.cache.set_budget(slots * RECORD)
        assert self.device.bytes_allotted() == slots * RECORD, "law 1: seen from outside"

    # ------------------------------------------------------------ what always holds

    @invariant()
    def laws_hold(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.ledger.check()
        assert self.device.bytes_allotted() <= self.cache.ledger.budget_bytes
        for expert in ALL:
            slot = self.cache.ledger.resident_slots(expert.layer)[expert.expert]
            if slot >= 0:
                held = bytes(self.cache.slab.view(slot, RECORD).numpy())
                assert held == content(expert), f"law 2: {expert} is resident, but its slot holds something else"

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.settle()
        self.cache.settle()
        assert self.cache.ledger.counters.lookups() == self.lookups, "law 6: uses were lost"
        self.told.next = []
        self._come_to_rest()
        self.cache.settle()
        self._table_is_right()
        self.cache.close()
        assert not self.device.registered

    def _come_to_rest(self) -> None:
        for _ in ALL:  # no more copies can be under way
            if self.cache.ledger.is_idle():
                return
            self.cache.copies.wait()
            self.cache.poll()
        raise AssertionError("a copy never ends")

    def _table_is_right(self) -> None:
        table = self.cache.table
        for expert in ALL:
            slot = self.cache.ledger.resident_slots(expert.layer)[expert.expert]
            where = self.cache.slab.address(slot) if slot >= 0 else self.cache.host.home(expert)
            assert table.entries[expert.layer, expert.expert].tolist() == [where, 0], expert
            assert bool(where & HOME) is (slot < 0)
        assert int(table.tail) - int(table.head) == self.cache.publication.handed


class OnHostMachine(DeviceMachine):
    """Likewise, with nothing missing read over the link: residents change by copies alone."""

    left = staticmethod(lambda missing: (missing, False))
    lands = False


class BothMachine(DeviceMachine):
    """Likewise, with every other missing expert left to the processor, or half of a lone one."""

    left = staticmethod(lambda missing: (missing // 2, missing == 1))


class HeldMachine(DeviceMachine):
    """Likewise, with steps of virtual mode among the others."""

    held: DeviceHeld | None = None

    def _held(self) -> DeviceHeld:
        if self.held is None:
            limits = SwapLimits(half_life=2.0, hysteresis=0.0, in_flight=3, ahead=0)
            sets = VirtualExperts([[1.0] * EXPERTS] * LAYERS, 1, limits)
            room = VirtualRoom([RECORD] * LAYERS, [EXPERTS] * LAYERS, 1, 0.75, [EXPERTS] * LAYERS)
            self.held = DeviceHeld(self.cache, sets, room)
        return self.held

    @rule(asked=st.lists(st.integers(0, 9), min_size=len(ALL), max_size=len(ALL)), lane=st.integers(0, 1))
    def virtual(self, asked: list[int], lane: int) -> None:
        """A step whose rows go to held experts alone finds them all, whatever else is under way."""
        held = self._held()
        self.told.next = []
        if not held.may_go_ahead:
            self._end(0)
        self._end(1)
        if not held.begin_step():
            return
        self.cache.begin_step(())
        self.cache.before_launch()
        routes: list[dict[int, int]] = [{} for _ in range(LAYERS)]
        for layer, expert in self.cache.ledger.kept:
            routes[layer][expert] = 1
        step = FakeStep(self.cache.table, routes)
        step.give(self.device.lanes[0])
        self.device.lanes[0].run(lambda: self._mask_is(routes))
        self.cache.after_launch()
        self.lookups += sum(map(len, routes))
        self.running.append(step)
        self.advance(lane, 6)
        self.cache.poll()
        self._end(0)
        assert all(routes) and [source for _, source in step.met] == [HIT] * sum(map(len, routes))
        sums = np.array(asked, np.float32).reshape(LAYERS, EXPERTS)
        held.digest(lambda: sums, 1.0)

    def _mask_is(self, routes: list[dict[int, int]]) -> None:
        held = [{expert for expert, word in enumerate(row) if word} for row in self.cache.table.held.tolist()]
        assert held == [set(chosen) for chosen in routes]

    @invariant()
    def kept_experts_stay(self) -> None:
        if self.held is not None:
            ledger = self.cache.ledger
            assert all(ledger.state(expert) is State.LEASED for expert in ledger.kept)

    def teardown(self) -> None:
        if self.held is not None:
            self.cache.meanwhile = lambda: None  # no swap begins any more
        super().teardown()


TestDevice = DeviceMachine.TestCase
TestDevice.settings = LIMITS
TestOnHost = OnHostMachine.TestCase
TestOnHost.settings = settings(LIMITS, max_examples=25)
TestBoth = BothMachine.TestCase
TestBoth.settings = settings(LIMITS, max_examples=25)
TestHeld = HeldMachine.TestCase
TestHeld.settings = settings(LIMITS, max_examples=30)
