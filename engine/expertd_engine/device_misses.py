"""Start-up's answer to where a card's misses are computed: measures the processor beside the link, and has it ready."""

from __future__ import annotations

import logging
import os

import torch

from expertd_engine.device_context import Context
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_host import HostTier
from expertd_engine.experts.device_host_compute import HostCompute, Room
from expertd_engine.experts.device_sharing import Sharing
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.governor import Governor
from expertd_engine.kernels import library
from expertd_engine.kernels.cuda.experts import ExpertLayout
from expertd_engine.kernels.cuda.host_experts import Mailbox
from expertd_engine.kernels.cuda.resolve import Left
from expertd_engine.kernels.host_experts import HostLayer
from expertd_engine.planning.misses import decide, may_compute

logger = logging.getLogger(__name__)

_SAID = {
    "link": "steps read them over the link",
    "cpu": "the processor computes them",
    "both": "steps read some over the link, or a part of one, while the processor computes the others",
}


def settle_misses(context: Context, cache: DeviceCache) -> Mailbox | None:
    """Decide who computes what steps miss; a mailbox for the model's kernels where that is the processor.

    Raises ConfigError where the processor is asked for and cannot.
    """
    asked, obstacle = context.config.device_misses, _obstacle(context, cache)
    if not may_compute(asked, obstacle):
        decided = decide(asked, obstacle, cache.link_bytes_per_s)
        context.fallbacks.extend([] if decided.fallback is None else [decided.fallback])
        return None
    computing = _host_compute(context, cache)
    cache.cpu_bytes_per_s, start_s = computing.measure(cache.read_beside)
    decided = decide(asked, obstacle, cache.link_bytes_per_s, cache.cpu_bytes_per_s, start_s)
    logger.info(
        "missing experts: %s; the link carries %.1f GB/s, %d threads compute %.1f GB/s after %.0f µs",
        _SAID[decided.where],
        decided.link_bytes_per_s / 1e9, computing.threads, decided.cpu_bytes_per_s / 1e9, start_s * 1e6,
    )  # fmt: skip
    if decided.where == "link":
        computing.close()
        return None
    computing.lands = decided.where == "both"
    cache.computing = computing
    # Where both work enough lands, and copies would take more of the link than they save.
    cache.ledger.brings_in = decided.where == "cpu"
    if decided.where == "both" and isinstance(cache.lookahead, Governor):
        cache.lookahead.payoff.begin_off()  # copies take from the link what a step reads itself
    shapes = [(nbytes, layout.inner) for nbytes, layout in zip(cache.record_bytes, context.parts.layouts, strict=True)]
    sharing = Sharing(context.device, decided, shapes, _room(context).experts)
    return computing.mailbox(context.device.torch_device, sharing)


def rehearsal_mailbox(context: Context) -> Mailbox | None:
    """What `settle_misses` may return, without a processor behind it: for steps that miss nothing."""
    if context.config.device_misses == "link":
        return None
    room = _room(context)

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=context.device.torch_device)

    rows = zeros(room.rows, room.hidden, dtype=torch.float32)
    weights = zeros(room.rows, room.top_k, dtype=torch.float32)
    pairs = zeros(room.rows * room.top_k)
    sums = zeros(room.rows, room.hidden, dtype=torch.int64)
    shared = (zeros(1), zeros(3), zeros(4, room.experts), pairs, rows, weights, sums)
    layers = len(context.parts.layouts)
    left = Left(zeros(layers, room.experts + 1, 2), zeros(layers, context.parts.experts), zeros(1))
    shares = context.config.device_misses in ("both", "auto")  # kernels that do take no less room
    return Mailbox(*shared, sent=zeros(1), arrived=zeros(1), left=left, later=zeros(layers), shares=shares)


def _obstacle(context: Context, cache: DeviceCache) -> str | None:
    """Why the processor cannot compute what steps miss; None where it can."""
    formats = {layout.format for layout in context.parts.layouts}
    unknown = sorted(formats - library.FORMATS.keys())
    if context.config.numerics == "invariant":
        return "numerics: invariant asks that a token's bits depend on its own sequence alone"
    if context.device.shares_memory:
        return "the card shares the host's memory, and misses nothing"
    if cache.by_layer:
        return "the host does not hold all experts in pinned memory"
    if unknown:
        return f"the processor's kernels do not compute {unknown[0]}"
    return library.why_missing()


def _host_compute(context: Context, cache: DeviceCache) -> HostCompute:
    assert isinstance(cache.host, HostTier)
    counts = cache.ledger.experts_per_layer
    layers = [
        HostLayer(
            _layout(layout), [cache.host.record(ExpertId(layer, e)).data_ptr() for e in range(counts[layer])],
            cache.record_bytes[layer],
        )
        for layer, layout in enumerate(context.parts.layouts)
    ]  # fmt: skip
    cores = context.config.threads or len(os.sched_getaffinity(0))
    # The engine's own thread looks at the running step all the time.
    return HostCompute(library.load(), context.device, layers, _room(context), max(1, cores - 1))


def _room(context: Context) -> Room:
    rows, top_k, experts = context.limits.buckets[-1], context.store.index.top_k, context.parts.experts
    return Room(rows, top_k, min(experts, rows * top_k), context.parts.layouts[0].hidden)


def _layout(layout: ExpertLayout) -> library.ExpertLayout:
    """Of the same records, for the processor's kernels."""
    gate, up, down = (data for data, _, _ in layout.offsets)
    kind, activation = library.FORMATS[layout.format], library.ACTIVATIONS[layout.activation]
    return library.ExpertLayout(
        *(layout.hidden, layout.inner, kind, activation, layout.alpha, layout.limit),
        *(gate, up, down, *layout.biases, library.ORDERS["rows"]),
    )
