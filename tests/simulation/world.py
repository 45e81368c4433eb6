"""One simulated engine and its users: the real core, scheduler, KV pool, prefix cache, expert cache, ledger, policies
and lookahead over a simulated device, in virtual time. One seed says everything that happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

import msgspec

from expertd_engine.bench.virtual_clock import Clock
from expertd_engine.core import EngineCore
from expertd_engine.errors import BudgetError
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.held import HeldExperts
from expertd_engine.experts.lookahead import EveryExpert, Exactness, LayerScan, Lookahead, NoLookahead
from expertd_engine.experts.policy import make_policy
from expertd_engine.experts.swaps import SwapLimits
from expertd_engine.experts.virtual import VirtualExperts
from expertd_engine.experts.virtual_room import VirtualRoom
from expertd_engine.kv_pool import KVPool
from expertd_engine.messages import Sampling, Submit, TextInput
from expertd_engine.prefix_cache import PrefixCache
from expertd_engine.scheduler import Scheduler
from expertd_engine.snapshot import Snapshot
from expertd_engine.step_plan import SchedulerLimits, StepPlan
from expertd_server.empty_snapshot import empty_snapshot
from simulation.checkers import CounterChecker, Expected, LedgerChecker, RequestChecker, WatchedLedger
from simulation.device import DiskFaults, SimDisk, SimSlab, Violation
from simulation.model import EOS, VOCAB, Shape, SimRunner

AGEING_STEPS = 8
MODE_STEPS = 2
EVENTFUL_STEPS = 40
"""After so many steps nothing fails any more, nobody leaves and no budget changes: all must come to its end."""


class Killed(BaseException):
    """The engine process is no more."""


class Guessing:
    """A predictor: names the routes of the step's tokens, each wrong with some probability."""

    exactness: Exactness = "predicted"

    def __init__(self, shape: Shape, quality: float, rng: Random) -> None:
        self._shape, self._quality, self._rng = shape, quality, rng
        self._width = max(shape.experts)
        self._tokens: Sequence[int] = ()

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        self._tokens = token_ids
        return self._hints(step, 0)

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        last = layer + 1 == len(self._shape.experts)
        return self._hints(step + 1, 0) if last else self._hints(step, layer + 1)

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return after + self._rng.randrange(1, 60) if self._rng.random() < 0.5 else None

    def _hints(self, step: int, layer: int) -> list[Hint]:
        count = self._shape.experts[layer]
        routed = {expert for token in self._tokens for expert in self._shape.routes[layer][token]}
        guessed = {e if self._rng.random() < self._quality else self._rng.randrange(count) for e in sorted(routed)}
        base = (step * len(self._shape.experts) + layer) * self._width
        return [Hint(ExpertId(layer, expert), base + expert) for expert in sorted(guessed)]


class World:
    """Everything that one seed says. `run` raises Violation, or whatever the engine raises."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = Random(seed)
        layers = rng.choice((1, 2, 2, 3))
        experts = tuple(rng.randint(3, 5) for _ in range(layers))
        every = rng.random() < 0.3
        if every:
            experts = (experts[0],) * layers
        pieces = tuple(rng.randint(1, 3) for _ in range(layers)) if rng.random() < 0.5 else (2,) * layers
        self.shape = Shape(experts, pieces, experts[0] if every else rng.randint(1, 2), rng.randrange(2**32))
        self.block_tokens = rng.choice((2, 4))
        self.max_model_len = 24
        self.num_blocks = 1 + -(-self.max_model_len // self.block_tokens) + rng.choice((0, 0, rng.randint(1, 8)))
        self.limits = SchedulerLimits(
            rng.randint(1, 5), rng.randint(1, 12), self.max_model_len, ageing_steps=AGEING_STEPS,
            max_scored_tokens=rng.randint(1, 8), max_mode_steps=MODE_STEPS,
        )  # fmt: skip
        self.policy = rng.choice(("lru", "lfu", "next-use"))
        self.quality = rng.choice((None, 0.0, 0.5, 1.0))
        self.prefix_cache = rng.random() < 0.5
        self.modes = ("exact", "virtual") if rng.random() < 0.3 else ("exact",)
        self.virtual = len(self.modes) > 1 and rng.random() < 0.7
        """Virtual steps route among held experts; else they differ from exact ones in name only."""
        self.calm = rng.random() < 0.25
        """Nothing fails, nobody leaves, no engine dies."""
        self.faults = DiskFaults()
        self.step_faults = 0.0
        self.kills = 0.0
        self.failing_allocations = range(0)
        """Numbers of the allocations that fail, counted from 0: one or two in each layer of each step."""
        self.allocations = 0
        self.requests, self.counters = RequestChecker(), CounterChecker()
        self.clock = Clock()
        self.step = 0
        self.disturbed = 0
        """Steps that faults may have cost."""
        self.engines = 0
        self.budget = self._some_budget()
        self._start_engine()
        if not self.calm:
            self._break_things()
        self.arrivals = sorted((rng.choice((0, rng.randrange(30))), i) for i in range(rng.randint(1, 9)))
        self.prefixes = [[rng.randrange(1, VOCAB) for _ in range(8)] for _ in range(2)]

    # ------------------------------------------------------------ an engine

    def _start_engine(self) -> None:
        shape, rng = self.shape, self.rng
        self.engines += 1
        self.clock = Clock()
        self.pool = KVPool(self.num_blocks, self.block_tokens)
        prefixes = PrefixCache(self.pool, "store") if self.prefix_cache else None
        self.scheduler = Scheduler(self.limits, self.pool, prefixes)
        self.ledger = WatchedLedger(
            shape.record_bytes, shape.experts, self.budget, make_policy(self.policy), self._all_bytes(),
            prefetch=rng.random() < 0.8, prefetch_depth=rng.randint(1, 4),
        )  # fmt: skip
        self.slab = SimSlab(self.ledger.num_slots, max(shape.pieces))
        self.disk = SimDisk(self.clock, self.slab, rng.randint(1, 3), rng, self.faults)
        self.cache = ExpertCache(self.ledger, self.slab, self.disk, self._lookahead(), shape.record_bytes)  # type: ignore[arg-type]  # stand-ins
        self.runner = SimRunner(shape, self.cache, self.slab, self.num_blocks, self.block_tokens)
        self.runner.during = self._during
        self.runner.held = self._held_experts() if self.virtual else None
        self.core = EngineCore(self.scheduler, self.runner, [EOS])
        self.checker = self.ledger.watcher = LedgerChecker(self.ledger, self.slab, shape)
        self.slab.changed = self.checker.bytes_now
        self.counters.counters.engine_ended()

    def _held_experts(self) -> HeldExperts:
        shape, rng = self.shape, self.rng
        limits = SwapLimits(rng.choice((2.0, 24.0)), rng.choice((0.0, 0.25)), rng.randint(0, 2), rng.randint(1, 2))
        sets = VirtualExperts([[1.0] * count for count in shape.experts], shape.top_k, limits)
        room = VirtualRoom(shape.record_bytes, shape.experts, shape.top_k, rng.choice((0.5, 0.75, 1.0)), shape.experts)
        return HeldExperts(self.cache, sets, room)

    def _lookahead(self) -> Lookahead:
        experts, top_k = self.shape.experts, self.shape.top_k
        if top_k == experts[0]:
            return EveryExpert(len(experts), experts[0], self.rng.randint(1, 6))
        source = NoLookahead() if self.quality is None else Guessing(self.shape, self.quality, self.rng)
        scans = len(set(experts)) == 1 and self.rng.random() < 0.5
        return LayerScan(source, len(experts), experts[0], top_k) if scans else source

    def _all_bytes(self) -> int:
        return sum(count * nbytes for count, nbytes in zip(self.shape.experts, self.shape.record_bytes, strict=True))

    def _some_budget(self) -> int:
        minimum = min(2 * max(self.shape.record_bytes), self._all_bytes())
        return self.rng.choice((minimum, minimum, self.rng.randint(minimum, self._all_bytes()), self._all_bytes()))

    def snapshot(self) -> Snapshot:
        counters = self.ledger.counters
        nothing = empty_snapshot(len(self.shape.experts))
        layers = zip(nothing.lookups, counters.hits, counters.late, counters.misses, strict=True)
        return msgspec.structs.replace(
            nothing,
            lookups=[
                msgspec.structs.replace(layer, hit=hit, late=late, miss=miss) for layer, hit, late, miss in layers
            ],
            demand_loads=counters.demand_loads, demand_bytes=counters.demand_bytes,
            prefetch_loads=counters.prefetch_loads, prefetch_bytes=counters.prefetch_bytes,
            prefetch_used=counters.prefetch_used, prefetch_late=counters.prefetch_late,
            prefetch_wasted=counters.prefetch_wasted, prefetch_cancelled=counters.prefetch_cancelled,
            load_failures=counters.load_failures, evictions=dict(counters.evictions),
            preemptions=self.scheduler.num_preemptions, kv_cache_evictions=self.pool.num_evictions,
        )  # fmt: skip

    # ------------------------------------------------------------ its life

    def run(self) -> None:
        while self.arrivals or self.core.has_work:
            self._arrive()
            if self.step < EVENTFUL_STEPS and not self.calm:
                self._meddle()
            elif self.step >= EVENTFUL_STEPS:
                self.faults.clear()
                self.step_faults = self.kills = 0.0
            self._take_step()
            self.step += 1
            self.requests.not_too_late(
                self.step, AGEING_STEPS, 1 if len(self.modes) == 1 else 1 + MODE_STEPS, self.disturbed
            )
        self._come_to_rest()

    def _take_step(self) -> None:
        try:
            if self.core.has_work:
                steps = self.core.step(self.clock.now)
                self._excuse()
                self.requests.told(steps)
            else:
                self.clock.advance(1.0)
                self.cache.pump()
                self.scheduler.check()
        except Killed:
            self._restart()
        self.checker.bytes_now()

    def _excuse(self) -> None:
        """Whoever was in two steps that were given up may have ended for it."""
        for group in self.runner.gave_up:
            self.disturbed += 2 * self.limits.max_sequences + 2
            for sequence_id in group:
                request = self.requests.live.get(sequence_id)
                if request is not None:
                    request.may.add("error" if "gave up" in request.may else "gave up")
        self.runner.gave_up.clear()

    def _restart(self) -> None:
        """The server's part: all live requests end with an error, another engine starts."""
        self.counters.observe(self.snapshot())
        for sequence_id in list(self.requests.live):
            self.requests.live[sequence_id].may.add("engine_dead")
            self.requests.end(sequence_id, "engine_dead")
        self._start_engine()
        self.counters.check()
        self.counters.observe(self.snapshot())

    def _come_to_rest(self) -> None:
        """Loads under way end; then everything balances and nothing is left."""
        if self.runner.held is not None:
            self.runner.held.close()
        self.cache.pump()
        while self.clock.run_next():
            self.cache.pump()
        self.checker.bytes_now()
        self.checker.at_idle()
        self.scheduler.check()
        if self.pool.used_blocks or self.requests.live:
            raise Violation(f"at the end {self.pool.used_blocks} blocks are held, {self.requests.live} live")
        if self.ledger.loading_bytes or self.ledger.resident_bytes > self.ledger.budget_bytes:
            raise Violation(f"at rest {self.ledger.resident_bytes} bytes of a budget of {self.ledger.budget_bytes}")
        self.counters.observe(self.snapshot())

    # ------------------------------------------------------------ what happens to it

    def _arrive(self) -> None:
        while self.arrivals and self.arrivals[0][0] <= self.step:
            sequence_id = self.arrivals.pop(0)[1]
            message = self._some_request(sequence_id)
            sampling = message.sampling
            length = min(len(message.inputs[0].token_ids) + sampling.max_tokens, self.max_model_len)
            eos = frozenset() if sampling.ignore_eos else frozenset({EOS})
            invariant = message.mode == "exact" or not self.virtual
            self.requests.submitted(Expected(message, self.step, self.shape, length, eos, invariant))
            self.core.submit(message, self.clock.now)

    def _some_request(self, sequence_id: int) -> Submit:
        rng = self.rng
        prompt = [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 8))]
        if rng.random() < 0.6:
            prompt = rng.choice(self.prefixes)[: rng.randint(3, 8)] + prompt[: rng.randint(0, 4)]
        sampling = Sampling(
            max_tokens=rng.choice((0, 1, rng.randint(2, 14), rng.randint(2, 14))),
            min_tokens=rng.choice((0, 0, 3)),
            ignore_eos=rng.random() < 0.5,
            prompt_logprobs=0 if rng.random() < 0.15 else None,
        )
        priority = rng.choice((0, 0, 0, -1, 1))
        mode = rng.choice(self.modes)
        return Submit(sequence_id, [TextInput(prompt)], sampling, priority=priority, mode=mode)  # type: ignore[arg-type]  # one of two words

    def _break_things(self) -> None:
        """Choose how bad this world is."""
        rng, faults = self.rng, self.faults
        faults.fail = rng.choice((0.0, 0.0, 0.02, 0.2))
        faults.stall = rng.choice((0.0, 0.0, 0.05))
        faults.late = rng.choice((0.0, 0.3))
        self.step_faults = rng.choice((0.0, 0.0, 0.01))
        self.kills = rng.choice((0.0, 0.0, 0.003))

    def _meddle(self) -> None:
        """Between two steps: somebody leaves, a budget changes, a record goes bad or gets well again."""
        rng = self.rng
        if rng.random() < 0.04 and self.requests.live:
            self._abort(rng.choice(list(self.requests.live)))
        if rng.random() < 0.12:
            self._change_budget()
        if rng.random() < 0.05:
            self._change_blocks()
        if rng.random() < 0.03:
            layer = rng.randrange(len(self.shape.experts))
            self.faults.unreadable.add(ExpertId(layer, rng.randrange(self.shape.experts[layer])))
        elif rng.random() < 0.3:
            self.faults.unreadable.clear()
        if rng.random() < 0.2:
            self.clock.advance(rng.uniform(0.0, 3.0))

    def _abort(self, sequence_id: int) -> None:
        self.requests.live[sequence_id].may.add("abort")
        self.core.abort([sequence_id], self.clock.now)

    def _change_budget(self) -> None:
        if self.rng.random() < 0.1:
            before = self.ledger.budget_bytes
            try:
                self.cache.set_budget(self.ledger.minimum_bytes - 1)
                raise Violation("a budget below the minimum was taken")
            except BudgetError:
                assert self.ledger.budget_bytes == before
            return
        self.budget = self._some_budget()
        self.cache.set_budget(self.budget)

    def _change_blocks(self) -> None:
        needed = 1 + -(-self.max_model_len // self.block_tokens)
        self.scheduler.resize_pool(self.rng.randint(needed, self.num_blocks))

    def _during(self, plan: StepPlan, layer: int) -> None:
        """Inside a step: time passes, memory is not to be had, somebody leaves, the engine is killed."""
        rng = self.rng
        self.clock.advance(rng.uniform(0.0, 0.4))
        self.allocations += 1
        if self.allocations - 1 in self.failing_allocations:
            raise MemoryError
        if self.calm or self.step >= EVENTFUL_STEPS:
            return
        if rng.random() < self.step_faults:
            raise MemoryError
        if rng.random() < self.kills:
            raise Killed
        if rng.random() < 0.005 and self.requests.live:
            self._abort(rng.choice(list(self.requests.live)))
