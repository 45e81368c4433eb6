"""Gives a loaded model its virtual mode: router adapters, expert norms, and the room that held experts may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from expertd_engine.config import Config
from expertd_engine.errors import ConfigError
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.held import HeldExperts
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.experts.swaps import SwapLimits
from expertd_engine.experts.virtual import VirtualExperts
from expertd_engine.experts.virtual_paths import VirtualPaths
from expertd_engine.experts.virtual_room import VirtualRoom
from expertd_engine.model.gates import NotLinear
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.path_routing import PathRouting
from expertd_engine.model.router_kinds import RouterAdapter, adapt_router
from expertd_engine.model.substitution import Floats
from expertd_engine.model.token_routes import TokenMap, TokenRoutes
from expertd_engine.model.virtual_foresight import NextLayers, next_layers
from expertd_engine.model.virtual_routing import Importance, VirtualRouting
from expertd_engine.planning.profile import Profile
from expertd_engine.planning.split import split_slots

FORESEEN = 6
"""Swaps that a step may begin by what its tokens will ask for; each costs a step a little more than half a percent. At
twice top-k slots of a fine-grained model 6, 8 and 12 of them leave KL at 0.140, 0.136 and 0.129 nats a token, where
none leave 0.189; at four times at 0.028, 0.027 and 0.025."""
LONG_MEMORY = 128.0
"""Half-life of scores, in tokens, where steps foresee what they will ask for: then scores only say who is worth little.
At twice top-k slots 12 swaps a step, named by a map in float32, leave 0.140, 0.130, 0.126, 0.124 and 0.123 with 8, 32,
64, 128 and 400."""
LOADS_A_THREAD = 4
"""Loads for held sets under way at once, by reading thread. With one in all, layers that nobody foresees (the first,
which matters most) hardly move: on a fine-grained model at twice top-k slots that doubled the divergence."""


@dataclass(frozen=True, slots=True)
class NoVirtualMode:
    """Why a model has none."""

    reason: str


@dataclass(frozen=True, slots=True)
class VirtualParts:
    """What virtual mode is made of, wherever a model's steps are computed."""

    routers: list[RouterAdapter]
    norms: list[Floats]
    """Of each layer's experts, `[E]`."""
    sets: VirtualExperts
    room: VirtualRoom


def virtual_parts(
    loaded: LoadedModel, index: StoreIndex, config: Config, profile: Profile | None, limits: SwapLimits,
    slot_bytes: int | None = None, priors: Sequence[Sequence[float]] | None = None,
) -> VirtualParts | NoVirtualMode:  # fmt: skip
    """`profile` says which layers are worth their slots; without, all get as many. `slot_bytes`: where every record
    takes as much. `priors`: as `VirtualExperts`, ‖E‖ by default. Raises ConfigError for more or fewer virtual slots
    than a layer can have.
    """
    routers = [adapt_router(loaded.model, layer.module) for layer in index.layers]
    known = [router for router in routers if isinstance(router, RouterAdapter)]
    if index.router_kind is None or len(known) < len(routers):
        return NoVirtualMode(
            f"the routers of {index.model_type} are of no kind that is known to choose under a mask: expert_mode may "
            f"be exact alone"
        )
    room = _room(index, config, slot_bytes)
    if config.virtual_slots is None and profile is not None and profile.model.layers:
        curves, record_bytes = profile.model.layers, room.record_bytes
        room = replace(room, divide=lambda nbytes: split_slots(curves, record_bytes, nbytes))
    norms = [np.array(layer.norms or [1.0] * layer.num_experts, np.float32) for layer in index.layers]
    sets = VirtualExperts(priors or [norm.tolist() for norm in norms], index.top_k, limits)
    return VirtualParts(known, norms, sets, room)


def build_virtual(
    loaded: LoadedModel,
    index: StoreIndex,
    config: Config,
    cache: ExpertCache,
    fallbacks: list[str],
    profile: Profile | None = None,
    tokens: TokenMap | None = None,
) -> VirtualRouting | PathRouting | NoVirtualMode:
    """As `virtual_parts`, of a model that the processor computes; `tokens` says where its tokens go. What is weaker
    than designed goes to `fallbacks`."""
    if loaded.pregating is not None:
        return _along_paths(loaded, index, config, cache, fallbacks)
    foresees = config.virtual_swaps == "foreseen"
    limits = SwapLimits(in_flight=LOADS_A_THREAD * config.io_threads)
    if not foresees:
        limits = replace(limits, ahead=0) if tokens is None else following_tokens(limits)
    made = virtual_parts(
        loaded, index, config, profile, limits, priors=None if tokens is None else priors_of(tokens, index)
    )
    if isinstance(made, NoVirtualMode):
        return made
    if tokens is None and not foresees and config.expert_mode == "virtual":
        fallbacks.append(
            "virtual mode swaps experts after steps alone: nothing tells where tokens go; run expertd profile"
        )
    foresight = _foresight(loaded, index, made.routers, fallbacks if foresees else [])
    told = None if tokens is None else TokenRoutes(tokens, index.top_k, loaded.pool.library if loaded.pool else None)
    held = HeldExperts(cache, made.sets, made.room, loaded.pool.library if loaded.pool else None)
    return VirtualRouting(made.routers, held, Importance(made.norms), foresight, tokens=told)


def _along_paths(
    loaded: LoadedModel, index: StoreIndex, config: Config, cache: ExpertCache, fallbacks: list[str]
) -> PathRouting | NoVirtualMode:
    """Of a model whose router has chosen before its steps. Paths are swapped between steps."""
    heads = int(loaded.model.config.router_heads)
    if (heads, index.top_k) != (1, 1):
        return NoVirtualMode(
            f"the model's router chooses {index.top_k} experts in each of {heads} heads before a step: substitution is "
            f"of whole paths, which one index for all layers makes, and expert_mode may be exact alone"
        )
    if config.virtual_swaps == "foreseen":
        fallbacks.append("virtual mode swaps whole paths, between steps: this model's layers have nothing to foresee")
    norms = [layer.norms or [1.0] * layer.num_experts for layer in index.layers]
    sizes = np.linalg.norm(np.array(norms), axis=0).tolist()
    limits = SwapLimits(in_flight=LOADS_A_THREAD * config.io_threads)
    sets = VirtualPaths(sizes, len(index.layers), limits)
    return PathRouting(sets, HeldExperts(cache, sets, _room(index, config, None)), sizes)


def following_tokens(limits: SwapLimits) -> SwapLimits:
    """Swaps as steps begin, none after them."""
    moving = replace(limits, ahead=0, per_step=0, foreseen=FORESEEN, half_life=LONG_MEMORY)
    return replace(moving, in_flight=max(limits.in_flight, FORESEEN))


def priors_of(tokens: TokenMap, index: StoreIndex) -> list[list[float]]:
    """What each layer gave its experts on the text of the fit."""
    return [row[: layer.num_experts].tolist() for row, layer in zip(tokens.shares, index.layers, strict=True)]


def _foresight(
    loaded: LoadedModel, index: StoreIndex, routers: list[RouterAdapter], fallbacks: list[str]
) -> NextLayers | None:
    try:
        return next_layers(loaded.model, [layer.module for layer in index.layers], routers)
    except NotLinear as reason:
        fallbacks.append(f"virtual mode swaps experts after steps alone: {reason}")
        return None


def lacks_norms(index: StoreIndex) -> bool:
    """Whether the store was made without what importance weighs experts by."""
    return any(layer.norms is None for layer in index.layers)


def _room(index: StoreIndex, config: Config, slot_bytes: int | None) -> VirtualRoom:
    experts = [layer.num_experts for layer in index.layers]
    slots, fewest = config.virtual_slots, min(experts)
    if slots is not None and not index.top_k <= slots <= fewest:
        raise ConfigError(
            f"virtual_slots: {slots} is not allowed: give {index.top_k}, which every token needs, to {fewest}, which "
            f"are all experts of a layer"
        )
    record_bytes = [slot_bytes or index.record_bytes(layer) for layer in range(len(experts))]
    wanted = experts if slots is None else [slots] * len(experts)
    return VirtualRoom(record_bytes, experts, index.top_k, config.virtual_share, wanted)
