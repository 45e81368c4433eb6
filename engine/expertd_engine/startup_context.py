"""What start-up has found out before anything is allotted; handed from part to part of it."""

from __future__ import annotations

from dataclasses import dataclass

from expertd_engine.config import Config
from expertd_engine.core import Constrain
from expertd_engine.experts.lookahead import Lookahead
from expertd_engine.experts.store import ExpertStore
from expertd_engine.model.kv_storage import LayerShape
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.predictor import Source
from expertd_engine.model.predictor_build import Choice
from expertd_engine.model.pregate import Pregate
from expertd_engine.model.step_model import StepModel
from expertd_engine.model.step_routes import RouteSource
from expertd_engine.step_plan import SchedulerLimits


@dataclass(frozen=True, slots=True)
class Context:
    """Of one start."""

    config: Config
    store: ExpertStore
    loaded: LoadedModel
    shapes: list[LayerShape]
    limits: SchedulerLimits
    constrain: Constrain
    fallbacks: list[str]
    numerics: str
    lookahead: Lookahead | None
    routes: RouteSource | None
    model: StepModel
    pregate: Pregate | None
    choice: Choice
    source: Source | None
    """Of predictions; None where nothing predicts."""
