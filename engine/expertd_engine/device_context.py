"""What start-up on a device has found out before anything is allotted; handed from part to part of it."""

from __future__ import annotations

from dataclasses import dataclass

from expertd_engine.config import Config
from expertd_engine.core import Constrain
from expertd_engine.device_memory import DeviceMeter
from expertd_engine.experts.device_streams import Device
from expertd_engine.experts.lookahead import Lookahead
from expertd_engine.experts.store import ExpertStore
from expertd_engine.memory import MemoryMeter
from expertd_engine.model.cuda_build import DeviceParts
from expertd_engine.model.cuda_model import Limits
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.step_routes import RouteSource


@dataclass(frozen=True, slots=True)
class Context:
    """Of one start."""

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
