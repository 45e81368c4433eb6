"""From a store and a configuration to an engine that can take steps: load, try, measure, plan, allot. Runs once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from expertd_engine.batching import Batching, PacedRoom, unbounded
from expertd_engine.config import Config
from expertd_engine.core import EngineCore, Forward, StepResult, foresee_nothing
from expertd_engine.engine_info import How, Parts, describe
from expertd_engine.errors import ConfigError
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.lookahead import Lookahead
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.sweep import Sweep
from expertd_engine.kv_pool import KVPool
from expertd_engine.lab.recorder import TraceRecorder
from expertd_engine.lab.trace import header_of
from expertd_engine.memory import MemoryMeter, available_bytes, release_free_memory
from expertd_engine.messages import EngineInfo
from expertd_engine.model.kv_storage import KVStorage, block_bytes
from expertd_engine.model.loader import LoadedModel, load_model
from expertd_engine.model.native_model import NativeModel
from expertd_engine.model.pathfinder import Pathfinder
from expertd_engine.model.predictor_build import choose, is_trivial, predictor_source
from expertd_engine.model.runner import Runner
from expertd_engine.model.step_routes import RouteSource
from expertd_engine.model.token_routes import has_token_map, read_token_map
from expertd_engine.model.trial import Trial
from expertd_engine.model.virtual_build import NoVirtualMode, build_virtual, lacks_norms
from expertd_engine.planning.startup_plan import Asked, Measured, StartupPlan, most_kv_blocks, plan_memory
from expertd_engine.prefix_cache import PrefixCache
from expertd_engine.profile_file import profile_to_serve
from expertd_engine.scheduler import Scheduler
from expertd_engine.startup_context import Context
from expertd_engine.startup_experts import expert_cache
from expertd_engine.startup_parts import (
    BLOCK_TOKENS,
    Report,
    asked_of,
    make_constrain,
    model_len_of,
    open_pool,
    verify_store,
)
from expertd_engine.step_plan import SchedulerLimits, StepPlan
from expertd_engine.warm_restart import WarmRestart

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """All parts of a running engine, owned by the engine thread."""

    core: EngineCore
    runner: Runner
    cache: ExpertCache
    sweep: Sweep
    pool: KVPool
    storage: KVStorage
    meter: MemoryMeter
    dense_bytes: int
    measured: Measured
    asked: Asked
    """What the memory plan was made from."""
    info: EngineInfo
    recorder: TraceRecorder | None = None
    """Of routes, where they are recorded."""
    warm: WarmRestart | None = None
    """Who remembers what an earlier engine knew; None where nobody shall."""


def start_engine(
    store: ExpertStore,
    config: Config,
    server_pid: int,
    report: Report,
    wrap: Callable[[Runner], Forward],
    *,
    lookahead: Lookahead | None = None,
    routes: RouteSource | None = None,
) -> Engine:
    """Raises StoreError, ModelError, ConfigError or BudgetError; nothing is left behind then but this process.

    `wrap` puts the caller's own measuring around the runner. `lookahead` and `routes` stand in for what the model has
    of its own, for measurements.
    """
    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    store.require_order("strips")
    verify_store(store, report)
    report("load", 0.0)
    fallbacks: list[str] = []
    loaded = load_model(store, open_pool(threads, fallbacks))
    foreseen = lookahead is not None or routes is not None or loaded.pregating is not None
    choice = choose(config, store, may_predict=not foreseen and not is_trivial(store.index))
    fallbacks += [choice.fallback] if choice.fallback else []
    source = predictor_source(choice, store, loaded)
    max_model_len = model_len_of(config, loaded)
    meter = MemoryMeter(server_pid)
    report("trial", 0.0)
    constrain = make_constrain(store, loaded, fallbacks)
    trial = Trial(loaded, store, BLOCK_TOKENS, max(max_model_len, config.max_step_tokens))
    if loaded.pool is not None and trial.not_native:
        fallbacks.append(f"all but the experts is computed by PyTorch, slowly: {trial.not_native}")
    if loaded.pool is not None and trial.router_not_native:
        fallbacks.append(f"the router is computed by PyTorch, slowly: {trial.router_not_native}")
    fallbacks += loaded.fallbacks
    invariant = trial.is_invariant()
    if not invariant and config.numerics == "invariant":
        raise ConfigError("numerics: 'invariant' is not allowed: this box's libraries give a row other bits in a batch")
    if not invariant:
        fallbacks.append("numerics are per batch: this box's libraries do not give a row the same bits in every batch")
    report("trial", 0.5)
    release_free_memory()
    base = meter.measure().used_bytes
    limits = SchedulerLimits(config.max_sequences, config.max_step_tokens, max_model_len)
    step = max(trial.largest_step_bytes(limits), _longest_prompt_bytes(trial, loaded, max_model_len))
    if not trial.peak_is_exact:
        fallbacks.append("the largest step is overestimated: this system does not let peak memory be measured anew")
    numerics = "invariant" if invariant else "per-batch"
    context = Context(
        config, store, loaded, trial.shapes, limits, constrain, fallbacks, numerics, lookahead, routes, trial.model,
        trial.pregate, choice, source,
    )  # fmt: skip
    measured, asked = _measured(context, base, step), asked_of(config, max_model_len)
    plan = plan_memory(measured, asked)
    report("allot", 0.0)
    return _assemble(context, (measured, asked), plan, meter, wrap)


def _measured(context: Context, base: int, step: int) -> Measured:
    index = context.store.index
    records = [index.record_bytes(layer) for layer in range(len(index.layers))]
    experts_total = index.expert_bytes_total()
    return Measured(
        base=base,
        step=step,
        experts_minimum=min(2 * max(records), experts_total),
        experts_total=experts_total,
        kv_block=block_bytes(context.shapes, BLOCK_TOKENS, context.loaded.dtype),
        block_tokens=BLOCK_TOKENS,
        available=available_bytes(),
    )


def _assemble(
    context: Context,
    planned_from: tuple[Measured, Asked],
    plan: StartupPlan,
    meter: MemoryMeter,
    wrap: Callable[[Runner], Forward],
) -> Engine:
    config, store, loaded = context.config, context.store, context.loaded
    # A pre-gating router may need one spare block for each sequence; of these it touches its own layer alone.
    spare = 0 if context.pregate is None else context.limits.max_rows
    most_blocks = max(plan.kv_blocks, most_kv_blocks(*planned_from))
    storage = KVStorage(context.shapes, most_blocks + 1, BLOCK_TOKENS, loaded.dtype, spare)
    pool = KVPool(plan.kv_blocks + 1, BLOCK_TOKENS)
    records = store.open_records(verify_always=config.verify_reads == "always")
    if records.fallback_reason:
        context.fallbacks.append(f"experts are read through the page cache: {records.fallback_reason}")
    cache, layers, onlookers = expert_cache(context, plan, records)
    profile = profile_to_serve(store, context.fallbacks)
    tokens = read_token_map(store.path, store.index.store_id) if has_token_map(store.path) else None
    virtual = build_virtual(loaded, store.index, config, cache, context.fallbacks, profile, tokens)
    if config.expert_mode == "virtual" and lacks_norms(store.index):
        context.fallbacks.append("virtual mode weighs all experts alike: this store has no norms; prepare it again")
    routing = None if isinstance(virtual, NoVirtualMode) else virtual
    pathfinder = _pathfinder(context, storage)
    runner = Runner(context.model, layers, storage, cache, context.routes, routing, pathfinder)
    recorder = _recorder(context)
    runner.onlookers = [*onlookers, *([] if recorder is None else [recorder])]
    prefixes = PrefixCache(pool, store.index.store_id) if config.prefix_cache else None
    room = _room(context, cache.ledger)
    scheduler = Scheduler(context.limits, pool, prefixes, _batching(context), room or unbounded)
    refusal = (lambda: virtual.reason) if isinstance(virtual, NoVirtualMode) else virtual.held.refusal
    foresee = foresee_nothing if pathfinder is None else pathfinder.foresee
    forward = wrap(runner) if room is None else _paced(wrap(runner), room, cache, config.io_threads)
    core = EngineCore(scheduler, forward, loaded.eos_token_ids, context.constrain, refusal, foresee)
    for fallback in context.fallbacks:
        logger.warning("fallback: %s", fallback)
    info = describe(config, store, loaded, Parts(plan, cache, pool, storage, records), _how(context))
    sweep = Sweep(store, records, busy=lambda: cache.transfers.depth() > 0)
    warm = WarmRestart(store.path, store.index.store_id, info.policy, cache) if config.warm_restart else None
    parts = (core, runner, cache, sweep, pool, storage, meter, loaded.dense_bytes)
    return Engine(*parts, *planned_from, info, recorder, warm)


def _batching(context: Context) -> Batching:
    config = context.config
    if config.batching == "expert-aware" and context.pregate is None:
        raise ConfigError(
            "batching: expert-aware is not allowed for this model, whose experts are known only inside a step: give "
            "decode-first or prefill-first"
        )
    return config.batching


def _room(context: Context, ledger: Ledger) -> PacedRoom | None:
    """For distinct experts, numbered by the router's heads; None where they are not known ahead."""
    if context.pregate is None:
        return None
    heads, records = context.pregate.path_shape.heads, context.store.index
    record, layers = max(layout.bytes for layout in records.layouts), len(records.layers)
    return PacedRoom(lambda: max(1, ledger.budget_bytes // record * heads // layers), record * layers // heads)


def _paced(forward: Forward, room: PacedRoom, cache: ExpertCache, readers: int) -> Forward:
    """`forward`, which tells `room` how long its steps take, and how long the readers took for what they read."""

    def step(plan: StepPlan) -> StepResult:
        result = forward(plan)
        counters = cache.ledger.counters
        read_bytes = counters.demand_bytes + counters.prefetch_bytes
        room.stepped(result.duration_s, read_bytes, cache.transfers.stats.busy_s / readers)
        return result

    return step


def _longest_prompt_bytes(trial: Trial, loaded: LoadedModel, max_model_len: int) -> int:
    """Of a pre-gating router's keys and values while a prompt is routed, which no step runs beside."""
    if trial.pregate is None:
        return 0
    return block_bytes([trial.pregate.kv_shape], BLOCK_TOKENS, loaded.dtype) * -(-max_model_len // BLOCK_TOKENS)


def _pathfinder(context: Context, storage: KVStorage) -> Pathfinder | None:
    if context.pregate is None:
        return None
    return Pathfinder(context.pregate, storage, context.limits.max_step_tokens)


def _recorder(context: Context) -> TraceRecorder | None:
    config = context.config
    if config.trace_dir is None:
        return None
    header = header_of(context.store.index, config.trace_share)
    return TraceRecorder(config.trace_dir, header, limit_bytes=config.trace_limit.resolve(0))


def _how(context: Context) -> How:
    pool = context.loaded.pool
    return How(
        max_model_len=context.limits.max_model_len,
        policy=context.choice.policy,
        numerics=context.numerics,
        kernels="torch" if pool is None else pool.library.instruction_set,
        step_path="native" if isinstance(context.model, NativeModel) else "modules",
        fallbacks=context.fallbacks,
    )
