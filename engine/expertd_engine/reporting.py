"""What the engine tells of itself: how steps went, all its numbers, where every expert is. Changes nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from expertd_engine.core import Forward, StepResult
from expertd_engine.experts.cache import ExpertCache, governor_in
from expertd_engine.experts.clairvoyant import Sampled
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.governor import Track
from expertd_engine.experts.ledger_base import LedgerBase
from expertd_engine.experts.lookahead import Lookahead
from expertd_engine.experts.payoff import PayOff
from expertd_engine.experts.residency import State
from expertd_engine.experts.transfer import LATENCY_BOUNDS_S
from expertd_engine.histogram import Histogram
from expertd_engine.live_budget import LiveBudget
from expertd_engine.memory import MemoryUse
from expertd_engine.messages import ExpertMap
from expertd_engine.model.path_routing import PathRouting
from expertd_engine.model.runner import Runner
from expertd_engine.model.virtual_routing import VirtualRouting
from expertd_engine.snapshot import Foresight, HistogramData, LayerLookups, LeadOutcomes, Snapshot, VirtualLayer
from expertd_engine.startup import Engine
from expertd_engine.step_plan import StepPlan

if TYPE_CHECKING:
    from expertd_engine.device_startup import DeviceEngine
    from expertd_engine.model.cuda_virtual import DeviceVirtual

    AnyEngine: TypeAlias = Engine | DeviceEngine

PHASES = ("prefill", "decode")
STEP_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0)
STEP_BOUNDS_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

LETTERS = {State.ABSENT: ".", State.LOADING: "o", State.DOOMED: "x", State.RESIDENT: "r", State.LEASED: "L"}


class StepMeter:
    """The engine's `Forward`: passes plans on and counts what they were."""

    def __init__(self, forward: Forward) -> None:
        self.steps = dict.fromkeys(PHASES, 0)
        self.seconds = {phase: Histogram(STEP_BOUNDS_S) for phase in PHASES}
        self.tokens = {phase: Histogram(STEP_BOUNDS_TOKENS) for phase in PHASES}
        self._forward = forward

    def __call__(self, plan: StepPlan) -> StepResult:
        result = self._forward(plan)
        self.steps[plan.phase] += 1
        self.seconds[plan.phase].add(result.duration_s)
        self.tokens[plan.phase].add(plan.num_tokens)
        return result


def take_expert_map(engine: AnyEngine) -> ExpertMap:
    """Where every expert is now, in O(experts)."""
    ledger = engine.cache.ledger
    counts = enumerate(ledger.experts_per_layer)
    return ExpertMap(["".join(LETTERS[ledger.state(ExpertId(layer, i))] for i in range(n)) for layer, n in counts])


def take_snapshot(engine: AnyEngine, meter: StepMeter, memory: MemoryUse, budget: LiveBudget, now: float) -> Snapshot:
    """All counters and gauges as they are between two steps or, in a long one, between two layers."""
    tiers = None if isinstance(engine.cache, ExpertCache) else engine.cache.tiers()
    if tiers is not None and not isinstance(engine.runner, Runner):
        ahead, in_vain = engine.runner.steps_ahead, engine.runner.steps_in_vain
        tiers = msgspec.structs.replace(tiers, steps_ahead=ahead, steps_in_vain=in_vain)
    counted = _counted(engine, meter, memory, budget, now)
    return msgspec.structs.replace(counted, foresight=foresight_of(engine), tiers=tiers)


def _counted(engine: AnyEngine, meter: StepMeter, memory: MemoryUse, budget: LiveBudget, now: float) -> Snapshot:
    ledger, transfers, scheduler = engine.cache.ledger, engine.cache.transfers, engine.core.scheduler
    counters, reads = ledger.counters, transfers.stats
    return Snapshot(
        time_s=now,
        lookups=lookups_by_layer(ledger),
        demand_loads=counters.demand_loads,
        demand_bytes=counters.demand_bytes,
        prefetch_loads=counters.prefetch_loads,
        prefetch_bytes=counters.prefetch_bytes,
        read_bytes=transfers.read_bytes,
        prefetch_issued=counters.prefetch_issued,
        prefetch_used=counters.prefetch_used,
        prefetch_late=counters.prefetch_late,
        prefetch_wasted=counters.prefetch_wasted,
        prefetch_cancelled=counters.prefetch_cancelled,
        prefetch_pending=counters.prefetch_pending,
        prefetch_outcome_bytes=dict(counters.prefetch_outcome_bytes),
        load_queue=transfers.depth(),
        load_seconds=reads.busy_s,
        load_failures=counters.load_failures,
        records_swept=engine.sweep.num_swept,
        records_bad=engine.sweep.first_bad(),
        cpu_seconds=time.process_time(),
        stall_seconds=engine.cache.stalls.by_cause(),
        step_stall_seconds=engine.cache.stalls.by_step(),
        evictions=dict(counters.evictions),
        expert_budget_bytes=ledger.budget_bytes,
        expert_limit_bytes=ledger.limit_bytes,
        resident_bytes=ledger.resident_bytes,
        loading_bytes=ledger.loading_bytes,
        peak_expert_bytes=ledger.peak_bytes,
        residents_by_layer=ledger.residents_by_layer(),
        memory_used_bytes=memory.used_bytes,
        memory_peak_bytes=memory.peak_bytes,
        memory_source=memory.source,
        memory_budget_bytes=budget.memory_budget_bytes,
        memory_shrinks=budget.shrinks,
        pressure_stalled=budget.control.stalled,
        pressure_lent_bytes=budget.control.lent_bytes,
        pressure_shrinks=budget.control.shrinks,
        dense_bytes=engine.dense_bytes,
        kv_capacity_bytes=engine.pool.capacity * engine.storage.block_bytes,
        kv_used_bytes=engine.pool.used_blocks * engine.storage.block_bytes,
        kv_cached_bytes=engine.pool.cached_blocks * engine.storage.block_bytes,
        prefix_cache_queries=scheduler.prefixes.num_queried if scheduler.prefixes else 0,
        prefix_cache_hits=scheduler.prefixes.num_hit if scheduler.prefixes else 0,
        kv_cache_evictions=engine.pool.num_evictions,
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        preemptions=scheduler.num_preemptions,
        steps=dict(meter.steps),
        virtual=virtual_by_layer(engine.runner.virtual),
        virtual_tokens=0 if engine.runner.virtual is None else engine.runner.virtual.counts.tokens,
        step_seconds={phase: seconds.data() for phase, seconds in meter.seconds.items()},
        step_tokens={phase: tokens.data() for phase, tokens in meter.tokens.items()},
        load_latency_seconds=HistogramData(list(LATENCY_BOUNDS_S), list(reads.latency_counts), reads.latency_s),
    )


def foresight_of(engine: AnyEngine) -> Foresight:
    """What a governor has counted, by lead, and the clairvoyant estimate."""
    met = engine.cache.clairvoyant.met if isinstance(engine.cache, ExpertCache) else Sampled()
    payoff = engine.cache.payoff or PayOff()
    counts = (met.lookups, met.hits, met.clairvoyant_hits, payoff.is_on, payoff.trials, payoff.switches)
    recorder = engine.recorder
    traced = (0, None) if recorder is None else (recorder.rows, recorder.failure)
    return Foresight(leads_of(engine.cache.lookahead), *counts, *traced)


def leads_of(lookahead: Lookahead) -> list[LeadOutcomes]:
    """Sums over layers; nothing where nobody predicts."""
    governor = governor_in(lookahead)
    if governor is None:
        return []
    by_lead: dict[int, list[Track]] = {}
    for (_, lead), track in governor.tracks.items():
        by_lead.setdefault(lead, []).append(track)
    names = ("named", "true", "followed", "followed_true", "late", "in_vain", "is_off")
    return [
        LeadOutcomes(lead, *(sum(getattr(track, name) for track in tracks) for name in names))
        for lead, tracks in sorted(by_lead.items())
    ]


def virtual_by_layer(virtual: VirtualRouting | PathRouting | DeviceVirtual | None) -> list[VirtualLayer]:
    if virtual is None:
        return []
    counts, sets = virtual.counts, virtual.held.sets
    columns = zip(counts.activations, counts.substituted, counts.mass, sets.swaps, sets.slots, strict=True)
    return [VirtualLayer(*column) for column in columns]


def lookups_by_layer(ledger: LedgerBase) -> list[LayerLookups]:
    counters = ledger.counters
    activations = (counters.activations[result] for result in ("hit", "late", "miss"))
    columns = zip(counters.hits, counters.late, counters.misses, counters.covered, *activations, strict=True)
    return [LayerLookups(*column) for column in columns]
