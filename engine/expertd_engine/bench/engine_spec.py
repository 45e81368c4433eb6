"""What an `EngineSpec` asks for: its store, its routes and what is foreseen of them, its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from expertd_engine.bench.channel import PREDICTORS, Channel, make_channel
from expertd_engine.bench.generated import GeneratedRoutes
from expertd_engine.bench.protocol import EngineSpec
from expertd_engine.bench.routing import RoutingShape, make_routing
from expertd_engine.bench.slow_disk import open_store
from expertd_engine.config import Config, Device, DeviceMisses, Policy, Predictor, parse_size
from expertd_engine.experts.store import ExpertStore


def opened(spec: EngineSpec) -> ExpertStore:
    """The store, as quick as it shall be. Raises StoreError."""
    return open_store(Path(spec.store), spec.disk_mib_s)


def generated(spec: EngineSpec, shape: RoutingShape) -> tuple[GeneratedRoutes | None, Channel | None]:
    """The routes and the channel that `spec` asks for; None for the model's own. Raises UsageError."""
    routing, channel = make_routing(spec.routing, shape, spec.seed), make_channel(spec.hints)
    if routing is None:
        return None, None
    return GeneratedRoutes(routing, channel, spec.streams + 1), channel


def config_of(spec: EngineSpec) -> Config:
    """What the engine is started with."""
    return Config(
        model=spec.store,
        expert_budget=parse_size(spec.expert_budget, share_allowed=True) if spec.expert_budget else None,
        memory_budget=parse_size(spec.memory_budget) if spec.memory_budget else None,
        expert_policy=cast(Policy, spec.policy),  # checked by the command line
        predictor=cast(Predictor, spec.hints if spec.hints in PREDICTORS else "none"),
        prefetch=spec.prefetch,
        prefix_cache=False,
        max_model_len=spec.max_model_len,
        max_sequences=spec.streams + 1,
        max_step_tokens=spec.max_step_tokens,
        threads=spec.threads,
        io_threads=spec.io_threads,
        device=cast(Device, spec.device),
        device_misses=cast(DeviceMisses, spec.device_misses),
    )
