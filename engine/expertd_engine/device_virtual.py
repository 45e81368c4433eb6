"""Virtual mode of an engine on a device: whether there is one, and what its parts are."""

from __future__ import annotations

from expertd_engine.device_context import Context
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_held import DeviceHeld
from expertd_engine.experts.swaps import SwapLimits
from expertd_engine.model.cuda_model import DeviceModel
from expertd_engine.model.cuda_virtual import DeviceVirtual
from expertd_engine.model.virtual_build import NoVirtualMode, lacks_norms, virtual_parts
from expertd_engine.profile_file import profile_to_serve

_COPIES = 8
"""For held sets, under way at once: swaps' share of the link, which is idle while rows go to held experts alone."""


def may_be_virtual(context: Context) -> bool:
    """Whether a model on this device gets steps of virtual mode."""
    return context.parts.dense.no_virtual is None and context.routes is None and not context.device.shares_memory


def open_virtual(context: Context, model: DeviceModel, cache: DeviceCache) -> DeviceVirtual | NoVirtualMode:
    """What is weaker than designed goes to the context's fallbacks. Raises ConfigError for a number of virtual slots
    that layers cannot have.
    """
    config, store, name = context.config, context.store, context.store.index.model_type
    if model.virtual is None or cache.by_layer:
        reason = context.parts.dense.no_virtual or "all experts are read at home, or none is, or routes are given"
        return NoVirtualMode(f"{name} has no virtual mode on this device: {reason}; expert_mode may be exact alone")
    profile = profile_to_serve(store, context.fallbacks)
    slot_bytes, limits = cache.ledger.plan.slot_bytes, SwapLimits(in_flight=_COPIES, ahead=0)
    made = virtual_parts(context.loaded, store.index, config, profile, limits, slot_bytes)
    if isinstance(made, NoVirtualMode):
        return made
    if config.expert_mode == "virtual" or config.virtual_swaps == "foreseen":
        context.fallbacks.append("virtual mode swaps experts after steps alone: on a device no route is foreseen")
    if config.expert_mode == "virtual" and lacks_norms(store.index):
        context.fallbacks.append("virtual mode weighs all experts alike: this store has no norms; prepare it again")
    return DeviceVirtual(DeviceHeld(cache, made.sets, made.room), made.norms, store.index.top_k)
