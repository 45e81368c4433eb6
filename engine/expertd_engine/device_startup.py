"""From a store and a configuration to an engine whose steps run on a device: load, match, try, measure, plan, allot."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from expertd_engine.config import Config
from expertd_engine.core import EngineCore, Forward
from expertd_engine.device_context import Context
from expertd_engine.device_experts import choice_of, expert_cache
from expertd_engine.device_memory import DeviceMeter
from expertd_engine.device_misses import settle_misses
from expertd_engine.device_rehearsal import make_model, measure, try_numerics, warm_up
from expertd_engine.device_virtual import open_virtual
from expertd_engine.engine_info import How, Parts, describe
from expertd_engine.errors import ConfigError
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_streams import CudaDevice, Device, HostDevice
from expertd_engine.experts.lookahead import Lookahead
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.sweep import Sweep
from expertd_engine.kv_pool import KVPool
from expertd_engine.memory import MemoryMeter
from expertd_engine.messages import EngineInfo
from expertd_engine.model.cuda_build import build_parts
from expertd_engine.model.cuda_graph import buckets
from expertd_engine.model.cuda_kv import DeviceKV
from expertd_engine.model.cuda_model import Limits
from expertd_engine.model.cuda_runner import DeviceRunner
from expertd_engine.model.cuda_virtual import DeviceVirtual
from expertd_engine.model.loader import load_model
from expertd_engine.model.step_routes import RouteSource
from expertd_engine.model.virtual_build import NoVirtualMode
from expertd_engine.planning.startup_plan import Asked, Measured, StartupPlan, plan_memory
from expertd_engine.prefix_cache import PrefixCache
from expertd_engine.scheduler import Scheduler
from expertd_engine.startup_parts import (
    BLOCK_TOKENS,
    Report,
    asked_of,
    make_constrain,
    model_len_of,
    open_pool,
    verify_store,
)
from expertd_engine.step_plan import SchedulerLimits
from expertd_engine.warm_restart import WarmRestart

logger = logging.getLogger(__name__)

_ALLOWED = {"batching": ("decode-first",), "predictor": ("auto", "none")}
"""Values of options that offer more on a processor."""


@dataclass(frozen=True, slots=True)
class DeviceEngine:
    """All parts of a running engine whose steps run on a device; as `startup.Engine`."""

    core: EngineCore
    runner: DeviceRunner
    cache: DeviceCache
    sweep: Sweep
    pool: KVPool
    storage: DeviceKV
    meter: DeviceMeter | MemoryMeter
    dense_bytes: int
    measured: Measured
    asked: Asked
    info: EngineInfo
    recorder: None = None
    """Routes of steps on a device are not recorded."""
    warm: WarmRestart | None = None


def start_on_device(
    store: ExpertStore,
    config: Config,
    server_pid: int,
    report: Report,
    wrap: Callable[[DeviceRunner], Forward],
    device: torch.device,
    *,
    lookahead: Lookahead | None = None,
    routes: RouteSource | None = None,
) -> DeviceEngine:
    """As `startup.start_engine`. `device` may be the processor, for Triton's interpreter."""
    store.require_order("rows")
    _refuse_what_is_not_there(config)
    meter = DeviceMeter(device) if device.type == "cuda" else MemoryMeter(server_pid)
    verify_store(store, report)
    report("load", 0.0)
    seam = _open_device(device)
    fallbacks: list[str] = []
    if isinstance(meter, DeviceMeter) and not meter.knows_others:
        fallbacks.append("what other programs use of the card counts as ours: nvidia-smi is not there to tell")
    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    loaded = load_model(store, open_pool(threads, fallbacks))
    model_len = model_len_of(config, loaded)
    constrain = make_constrain(store, loaded, fallbacks)
    report("trial", 0.0)
    parts = build_parts(loaded, store.index, BLOCK_TOKENS, max(model_len, config.max_step_tokens), device)
    limits = Limits(buckets(config.max_sequences), config.max_step_tokens, config.max_sequences, model_len)
    if parts.not_matched is not None:
        fallbacks.append(f"all but the experts is computed by PyTorch's modules, slowly: {parts.not_matched}")
    context = Context(config, store, loaded, parts, limits, constrain, fallbacks, lookahead, routes, seam, meter)
    measured = measure(context)
    asked = asked_of(config, model_len)
    plan = plan_memory(measured, asked)
    report("allot", 0.0)
    return _assemble(context, (measured, asked), plan, wrap, report)


def _refuse_what_is_not_there(config: Config) -> None:
    """Raise ConfigError for an option that would have no effect on a device."""
    for name, allowed in _ALLOWED.items():
        if (given := getattr(config, name)) not in allowed:
            raise ConfigError(f"{name}: {str(given)!r} is not there on a device: allowed are {', '.join(allowed)}")
    if config.trace_dir is not None:
        raise ConfigError(f"trace_dir: {str(config.trace_dir)!r} is not allowed: on a device no traces are recorded")
    if config.memory_pressure:
        raise ConfigError("memory_pressure: True is not allowed: a card's memory is no help to the box")


def _open_device(device: torch.device) -> Device:
    """Steps run on a stream of ours: the default one waits for every other."""
    if device.type == "cpu":
        return HostDevice()
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))
    return CudaDevice(device)


def _assemble(
    context: Context,
    planned_from: tuple[Measured, Asked],
    plan: StartupPlan,
    wrap: Callable[[DeviceRunner], Forward],
    report: Report,
) -> DeviceEngine:
    config, store, loaded, fallbacks = context.config, context.store, context.loaded, context.fallbacks
    kv = DeviceKV(context.parts.shapes, plan.kv_blocks + 1, BLOCK_TOKENS, context.parts.dtype, context.device)
    records = store.open_records(verify_always=config.verify_reads == "always")
    if records.fallback_reason:
        fallbacks.append(f"experts are read through the page cache: {records.fallback_reason}")
    if kv.fallback:
        fallbacks.append(kv.fallback)
    cache = expert_cache(context, plan, records, report)
    model = make_model(context, kv, cache.table, settle_misses(context, cache))
    cache.plans.launches_ahead = model.is_graph
    virtual = open_virtual(context, model, cache)
    runner = DeviceRunner(model, cache, context.routes, virtual if isinstance(virtual, DeviceVirtual) else None)
    pool = KVPool(plan.kv_blocks + 1, BLOCK_TOKENS)
    prefixes = PrefixCache(pool, store.index.store_id) if config.prefix_cache else None
    limits = SchedulerLimits(config.max_sequences, config.max_step_tokens, context.limits.model_len)
    refusal = (lambda: virtual.reason) if isinstance(virtual, NoVirtualMode) else virtual.held.refusal
    scheduler = Scheduler(limits, pool, prefixes)
    if context.parts.dense.is_graph:  # else who launches the next step sees the tokens of this one after all of that
        runner.look_ahead = scheduler.look_ahead
    core = EngineCore(scheduler, wrap(runner), loaded.eos_token_ids, context.constrain, refusal)
    warm = _warm_restart(context, cache)
    if warm is not None:
        warm.recall()
    warm_up(context, model, cache, report)
    how = _how(context, try_numerics(context, model, cache), cache)
    context.meter.measure()
    for fallback in fallbacks:
        logger.warning("fallback: %s", fallback)
    info = describe(config, store, loaded, Parts(plan, cache, pool, kv, records), how)
    sweep = Sweep(store, records, busy=lambda: cache.transfers.depth() > 0)
    parts = (core, runner, cache, sweep, pool, kv, context.meter, loaded.dense_bytes)
    return DeviceEngine(*parts, *planned_from, info, warm=warm)


def _warm_restart(context: Context, cache: DeviceCache) -> WarmRestart | None:
    store = context.store
    if not context.config.warm_restart:
        return None
    if cache.by_layer:
        context.fallbacks.append("each start is cold: layers bring in their experts, and none is there before")
        return None
    return WarmRestart(store.path, store.index.store_id, choice_of(context).policy, cache)


def _how(context: Context, numerics: str, cache: DeviceCache) -> How:
    where = context.device.torch_device
    path = "graph" if where.type == "cuda" else "interpreted"
    return How(
        max_model_len=context.limits.model_len,
        policy=choice_of(context).policy,
        numerics=numerics,
        kernels="triton",
        step_path="modules" if context.parts.not_matched else "layers" if cache.by_layer else path,
        fallbacks=context.fallbacks,
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu (interpreted)",
    )
