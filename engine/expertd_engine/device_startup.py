"""From a store and a configuration to an engine whose steps run on a device: load, match, try, measure, plan, allot."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers

from expertd_engine.config import Config, Size
from expertd_engine.core import Constrain, EngineCore, Forward
from expertd_engine.device_memory import DeviceMeter
from expertd_engine.errors import ConfigError, ResourceError
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_hints import AbsentHints
from expertd_engine.experts.device_host import HostTier
from expertd_engine.experts.device_ledger import DeviceLedger
from expertd_engine.experts.device_pool import ChunkPlan
from expertd_engine.experts.device_slab import plan_chunks
from expertd_engine.experts.device_spill import SpilledHost
from expertd_engine.experts.device_streams import CudaDevice, Device, HostDevice
from expertd_engine.experts.lookahead import EveryExpert, Lookahead, NoLookahead
from expertd_engine.experts.policy import make_policy
from expertd_engine.experts.store import ExpertStore, RecordFile
from expertd_engine.experts.store_format import ALIGNMENT, StoreIndex
from expertd_engine.experts.sweep import Sweep
from expertd_engine.kernels.cuda.resolve import TablePointers
from expertd_engine.kv_pool import KVPool
from expertd_engine.memory import MemoryMeter, available_bytes
from expertd_engine.messages import PROTOCOL_VERSION, EngineInfo
from expertd_engine.model.attention import Span
from expertd_engine.model.cuda_build import DeviceParts, build_parts
from expertd_engine.model.cuda_graph import buckets
from expertd_engine.model.cuda_model import DeviceModel, Limits, StepTokens
from expertd_engine.model.cuda_program import DeviceKV
from expertd_engine.model.cuda_runner import DeviceRunner
from expertd_engine.model.cuda_trial import is_invariant
from expertd_engine.model.loader import LoadedModel, load_model
from expertd_engine.model.moe import RouteSource
from expertd_engine.planning.startup_plan import Asked, Measured, StartupPlan, plan_memory
from expertd_engine.prefix_cache import PrefixCache
from expertd_engine.scheduler import Scheduler, SchedulerLimits
from expertd_engine.startup import (
    BLOCK_TOKENS,
    Report,
    asked_of,
    governed,
    make_constrain,
    model_len_of,
    open_pool,
    policy_name,
    verify_store,
)

logger = logging.getLogger(__name__)

_PREFETCH_DEPTH = 64
"""Prefetches that may wait or be under way: what a step's hints name at once."""
_ALLOWED = {"batching": ("decode-first",), "expert_mode": ("exact",), "predictor": ("auto", "none")}
"""Values of options that offer more on a processor."""
NO_VIRTUAL_MODE = "virtual mode is not there on a device"


def refuse_virtual() -> str:
    """Why no sequence may ask for virtual mode."""
    return NO_VIRTUAL_MODE


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
    warm: None = None
    """Experts in host memory are loaded before it is ready: there is nothing to remember."""


@dataclass(frozen=True, slots=True)
class _Context:
    config: Config
    store: ExpertStore
    loaded: LoadedModel
    parts: DeviceParts
    limits: Limits
    constrain: Constrain
    fallbacks: list[str]
    lookahead: Lookahead | None
    routes: RouteSource | None
    device: Device
    meter: DeviceMeter | MemoryMeter
    """The processes' own where the processor stands in for a device."""


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
    context = _Context(
        config, store, loaded, parts, limits, constrain, fallbacks, lookahead, routes, seam, meter
    )  # fmt: skip
    measured = _measured(context)
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


class _EmptyTable:
    """A table of no expert, for trial steps whose rows are all padding."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        def words(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.pointers = TablePointers(
            entries=words(layers, experts, 2, dtype=torch.int64), slot_address=words(1, dtype=torch.int64),
            ready=words(1), landing=words(2), head=words(1), tail=words(1),
            seen=words(layers, experts, 4), seen_count=words(layers), progress=words(1),
        )  # fmt: skip

    def apply(self) -> None:
        """Nothing changes."""


def _model(context: _Context, kv: DeviceKV, table: Any) -> DeviceModel:
    parts = context.parts
    return DeviceModel(
        parts.layers, parts.ends, parts.layouts, kv, table, context.limits, parts.dtype,
        given_routes=context.routes is not None, invariant=context.config.numerics == "invariant",
    )  # fmt: skip


def _measured(context: _Context) -> Measured:
    """With everything on the device but experts and keys and values: a model over one block, graphs captured."""
    index, parts, where = context.store.index, context.parts, context.device.torch_device
    kv = DeviceKV(parts.shapes, 2, BLOCK_TOKENS, parts.dtype, where)
    if where.type == "cuda":
        _model(context, kv, _EmptyTable(len(index.layers), _most_experts(context), where))
    used = context.meter.measure().used_bytes
    free = context.meter.free_bytes() if isinstance(context.meter, DeviceMeter) else available_bytes()
    return Measured(
        base=used,
        step=_largest_step_bytes(context),
        experts_minimum=_chunks(context).bytes_of(2),
        experts_total=_all_slots_bytes(context),
        kv_block=kv.block_bytes,
        block_tokens=BLOCK_TOKENS,
        available=free,
    )


def _most_experts(context: _Context) -> int:
    return max(layer.num_experts for layer in context.store.index.layers)


def _largest_step_bytes(context: _Context) -> int:
    """What a step of many rows allots besides its buffers, for a moment: sorted pairs and the like, several times."""
    pairs = context.limits.rows * context.store.index.top_k
    return 64 * pairs


def _assemble(
    context: _Context,
    planned_from: tuple[Measured, Asked],
    plan: StartupPlan,
    wrap: Callable[[DeviceRunner], Forward],
    report: Report,
) -> DeviceEngine:
    config, store, loaded, parts = context.config, context.store, context.loaded, context.parts
    where = context.device.torch_device
    kv = DeviceKV(parts.shapes, plan.kv_blocks + 1, BLOCK_TOKENS, parts.dtype, where)
    records = store.open_records(verify_always=config.verify_reads == "always")
    if records.fallback_reason:
        context.fallbacks.append(f"experts are read through the page cache: {records.fallback_reason}")
    cache = _expert_cache(context, plan, records, report)
    model = _model(context, kv, cache.table)
    runner = DeviceRunner(model, cache, context.routes)
    pool = KVPool(plan.kv_blocks + 1, BLOCK_TOKENS)
    prefixes = PrefixCache(pool, store.index.store_id) if config.prefix_cache else None
    limits = SchedulerLimits(config.max_sequences, config.max_step_tokens, context.limits.model_len)
    core = EngineCore(
        Scheduler(limits, pool, prefixes), wrap(runner), loaded.eos_token_ids, context.constrain, refuse_virtual
    )
    _warm(context, model, cache, report)
    numerics = _numerics(context, model, cache)
    context.meter.measure()
    for fallback in context.fallbacks:
        logger.warning("fallback: %s", fallback)
    info = _describe(context, plan, cache, pool, kv, records, numerics)
    sweep = Sweep(store, records, busy=lambda: cache.transfers.depth() > 0)
    measured, asked = planned_from
    asked = replace(asked, kv_budget=Size(bytes=plan.kv_blocks * kv.block_bytes))  # it stays as it was allotted
    return DeviceEngine(
        core, runner, cache, sweep, pool, kv, context.meter, loaded.dense_bytes, measured, asked, info
    )  # fmt: skip


def _expert_cache(context: _Context, plan: StartupPlan, records: RecordFile, report: Report) -> DeviceCache:
    config, index = context.config, context.store.index
    host = _host_tier(context, records, report)
    record_bytes = [index.record_bytes(layer) for layer in range(len(index.layers))]
    ledger = DeviceLedger(
        record_bytes,
        [layer.num_experts for layer in index.layers],
        _chunks(context),
        plan.expert_budget_bytes,
        make_policy(policy_name(config), len(index.layers) * index.top_k),
        max_budget_bytes=_all_slots_bytes(context),
        prefetch=config.prefetch and isinstance(host, HostTier) and host.pinned,
        prefetch_depth=_PREFETCH_DEPTH,
    )
    lookahead = foresight_for(index, context.lookahead, ledger)
    rows = min(_most_experts(context), context.limits.buckets[-1] * index.top_k)
    return DeviceCache(index, context.device, host, ledger, lookahead, rows)


def _host_tier(context: _Context, records: RecordFile, report: Report) -> HostTier | SpilledHost:
    """All experts in pinned memory, or what the host's budget has room for over the disk."""
    config, index = context.config, context.store.index
    total, room = index.expert_bytes_total(), available_bytes()
    budget = total if config.host_budget is None else config.host_budget.resolve(total)
    if budget >= total:
        host = HostTier(index, context.device, room)
        host.fill(records, len(os.sched_getaffinity(0)), lambda fraction: report("allot", 0.9 * fraction))
        if host.fallback is not None:
            context.fallbacks.append(f"{host.fallback}: steps wait at every layer for what is missing")
        return host
    if budget > room:
        raise ResourceError(f"the host budget is {budget} bytes, but only {room} are available")
    policy = make_policy(policy_name(config), len(index.layers) * index.top_k)
    spilled = SpilledHost(index, context.device, records, budget, policy, config.io_threads)
    context.fallbacks.append("the host does not hold all experts: steps wait at every layer for what is missing")
    if spilled.fallback is not None:
        context.fallbacks.append(spilled.fallback)
    return spilled


def foresight_for(index: StoreIndex, given: Lookahead | None, ledger: DeviceLedger) -> Lookahead:
    """As `startup.lookahead_for`, but that steps of many rows stream their experts and need no hints."""
    num_layers, counts = len(index.layers), {layer.num_experts for layer in index.layers}
    if counts == {index.top_k}:
        return EveryExpert(num_layers, index.top_k, 0)
    if given is None or given.exactness == "none":
        return given or NoLookahead()
    absent = AbsentHints(given, ledger.resident_slots)
    return governed(absent, index, ledger) if given.exactness == "predicted" else absent


def _chunks(context: _Context) -> ChunkPlan:
    index = context.store.index
    experts = sum(layer.num_experts for layer in index.layers)
    chunks = plan_chunks(max(layout.bytes for layout in index.layouts), experts)
    return chunks if context.device.torch_device.type == "cuda" else replace(chunks, granule=ALIGNMENT)


def _all_slots_bytes(context: _Context) -> int:
    """Memory of as many slots as there are experts, in chunks."""
    chunks = _chunks(context)
    whole, rest = divmod(sum(layer.num_experts for layer in context.store.index.layers), chunks.chunk_slots)
    return whole * chunks.bytes_of(chunks.chunk_slots) + chunks.bytes_of(rest)


def _warm(context: _Context, model: DeviceModel, cache: DeviceCache, report: Report) -> None:
    """Fill slots; then a prompt as long as a step, then one token: what is compiled at first use is there when a
    request comes, and what the largest step allots for a moment is allotted.
    """
    cache.fill()
    if context.device.torch_device.type == "cpu":
        return  # nothing is compiled
    count = min(context.limits.step_tokens, context.limits.model_len)
    blocks = [1] * -(-count // BLOCK_TOKENS)  # its keys and values are no one's, and overwrite each other
    for first, length in ((0, count), (count - 1, 1)):
        cache.begin_step((), scan=True)
        model.step(_probe(context, first, length, blocks), cache)
        cache.end_step()
    report("allot", 1.0)


def _probe(context: _Context, first: int, length: int, blocks: list[int]) -> StepTokens:
    index = context.store.index
    routes = np.tile(np.arange(index.top_k), (length, len(index.layers), 1))
    return StepTokens(
        [0] * length, range(first, first + length), [Span(0, first, length, blocks)], [length - 1],
        routes=None if context.routes is None else routes,
    )  # fmt: skip


def _numerics(context: _Context, model: DeviceModel, cache: DeviceCache) -> str:
    """`invariant` where that is asked for and holds, by trial. Raises ConfigError where it does not."""
    if context.config.numerics != "invariant":
        return "per-batch"
    if not is_invariant(model, cache, context.limits, BLOCK_TOKENS):
        raise ConfigError("numerics: 'invariant' is not allowed: on this device a row's bits depend on its batch")
    return "invariant"


def _describe(
    context: _Context, plan: StartupPlan, cache: DeviceCache, pool: KVPool, kv: DeviceKV, records: RecordFile,
    numerics: str,
) -> EngineInfo:  # fmt: skip
    config, index, loaded = context.config, context.store.index, context.loaded
    where = context.device.torch_device
    card = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu (interpreted)"
    return EngineInfo(
        protocol=PROTOCOL_VERSION,
        pid=os.getpid(),
        model_type=index.model_type,
        store_path=str(context.store.path),
        store_id=index.store_id,
        dtype=index.experts_format,
        vocab_size=loaded.vocab_size,
        max_model_len=context.limits.model_len,
        max_sequences=config.max_sequences,
        max_step_tokens=config.max_step_tokens,
        eos_token_ids=list(loaded.eos_token_ids),
        num_moe_layers=len(index.layers),
        num_experts=_most_experts(context),
        top_k=index.top_k,
        expert_record_bytes=max(layout.bytes for layout in index.layouts),
        expert_bytes_total=index.expert_bytes_total(),
        expert_budget_bytes=plan.expert_budget_bytes,
        minimum_expert_budget_bytes=cache.ledger.minimum_bytes,
        maximum_expert_budget_bytes=index.expert_bytes_total()
        if plan.memory_budget_bytes is None
        else plan.expert_budget_bytes,
        memory_budget_bytes=plan.memory_budget_bytes,
        kv_block_tokens=BLOCK_TOKENS,
        kv_blocks=pool.capacity,
        kv_bytes=pool.capacity * kv.block_bytes,
        policy=policy_name(config),
        lookahead=cache.lookahead.exactness,
        prefetch=config.prefetch,
        numerics=numerics,
        kernels="triton",
        step_path="layers" if cache.by_layer else "graph" if where.type == "cuda" else "interpreted",
        direct_io=records.direct,
        fallbacks=context.fallbacks,
        torch_version=str(torch.__version__),
        transformers_version=transformers.__version__,
        device=card,
    )
