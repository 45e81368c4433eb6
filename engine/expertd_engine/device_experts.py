"""The experts of an engine on a device: how many slots, in what memory, over which tier, with whose foresight."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from expertd_engine.device_context import Context
from expertd_engine.errors import ResourceError
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_columns import uses_of
from expertd_engine.experts.device_hints import AbsentHints, Tried
from expertd_engine.experts.device_host import HostTier
from expertd_engine.experts.device_ledger import DeviceLedger
from expertd_engine.experts.device_pool import ChunkPlan
from expertd_engine.experts.device_slab import plan_chunks
from expertd_engine.experts.device_spill import SpilledHost
from expertd_engine.experts.lookahead import EveryExpert, Lookahead, NoLookahead
from expertd_engine.experts.record_file import RecordFile
from expertd_engine.experts.store_format import ALIGNMENT, StoreIndex
from expertd_engine.memory import available_bytes
from expertd_engine.model.predictor_build import Choice, choose, served_policy
from expertd_engine.model.substitution import SHARED_BY, widest
from expertd_engine.planning.startup_plan import StartupPlan
from expertd_engine.startup_parts import governed

_PREFETCH_DEPTH = 64
"""Prefetches that may wait or be under way: what a step's hints name at once."""

Report = Callable[[str, float], None]


def expert_cache(context: Context, plan: StartupPlan, records: RecordFile, report: Report) -> DeviceCache:
    """Slots for the plan's budget, none of them filled. Raises ResourceError."""
    config, index = context.config, context.store.index
    host = _host_tier(context, records, report)
    record_bytes = [index.record_bytes(layer) for layer in range(len(index.layers))]
    choice = choice_of(context)
    context.fallbacks.extend([choice.fallback] if choice.fallback else [])
    experts, policy = [layer.num_experts for layer in index.layers], served_policy(choice, index)
    ledger = DeviceLedger(
        record_bytes,
        experts,
        chunks_of(context),
        plan.expert_budget_bytes,
        policy,
        max_budget_bytes=all_slots_bytes(context),
        prefetch=config.prefetch and isinstance(host, HostTier) and host.pinned,
        prefetch_depth=_PREFETCH_DEPTH,
        uses=uses_of(experts, policy),
    )
    lookahead = foresight_for(index, context.lookahead, ledger)
    rows = min(context.parts.experts, context.limits.buckets[-1] * widest(index.top_k, SHARED_BY))
    return DeviceCache(index, context.device, host, ledger, lookahead, rows)


def choice_of(context: Context) -> Choice:
    """Which policy decides who gives way. Raises ConfigError and StoreError, as `choose`."""
    return choose(context.config, context.store, may_predict=False)


def _host_tier(context: Context, records: RecordFile, report: Report) -> HostTier | SpilledHost:
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
    policy = served_policy(choice_of(context), index)
    spilled = SpilledHost(index, context.device, records, budget, policy, config.io_threads)
    context.fallbacks.append("the host does not hold all experts: steps wait at every layer for what is missing")
    if spilled.fallback is not None:
        context.fallbacks.append(spilled.fallback)
    return spilled


def foresight_for(index: StoreIndex, given: Lookahead | None, ledger: DeviceLedger) -> Lookahead:
    """As on the processor (`startup_experts.lookahead_for`), but that steps of many rows stream their experts and need
    no hints, and that what is exact has to pay as well."""
    num_layers, counts = len(index.layers), {layer.num_experts for layer in index.layers}
    if counts == {index.top_k}:
        return EveryExpert(num_layers, index.top_k, 0)
    if given is None or given.exactness == "none":
        return given or NoLookahead()
    absent = AbsentHints(given, ledger.resident_slots)
    return governed(absent, index, ledger) if given.exactness == "predicted" else Tried(absent)


def chunks_of(context: Context) -> ChunkPlan:
    """How slots lie in the device's memory."""
    index = context.store.index
    experts = sum(layer.num_experts for layer in index.layers)
    chunks = plan_chunks(max(layout.bytes for layout in index.layouts), experts)
    return chunks if context.device.torch_device.type == "cuda" else replace(chunks, granule=ALIGNMENT)


def all_slots_bytes(context: Context) -> int:
    """Memory of as many slots as there are experts, in chunks."""
    return chunks_of(context).budget_of(sum(layer.num_experts for layer in context.store.index.layers))
