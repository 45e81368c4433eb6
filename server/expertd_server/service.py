"""What every route may reach: one typed object for the server's life, owned by the daemon."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import Literal

from expertd_engine.config import Config
from expertd_engine.messages import EngineInfo
from expertd_server import __version__
from expertd_server.admission import Admission, Bodies
from expertd_server.chat_format import ChatFormat
from expertd_server.console import Console
from expertd_server.engine_client import EngineClient
from expertd_server.errors import Draining, EngineDead, ModelNotFound, Unavailable
from expertd_server.grammar import GrammarChecker
from expertd_server.metrics import Metrics
from expertd_server.prompts import TextCodec

State = Literal["loading", "ready", "engine_dead", "draining"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What there is to know of the model once an engine serves it."""

    name: str
    codec: TextCodec
    chat: ChatFormat
    info: EngineInfo
    loaded_unix_s: int

    @property
    def fingerprint(self) -> str:
        """Changes when the same request may bring other tokens."""
        info = self.info
        libraries = (info.torch_version, info.transformers_version)
        parts = (info.store_id, info.dtype, info.numerics, info.device, *libraries)
        return f"expertd-{__version__}-{hashlib.sha256('/'.join(parts).encode()).hexdigest()[:10]}"


@dataclass(slots=True)
class Service:
    """The state of the server as requests see it. Written by the supervisor and the daemon, read by the routes."""

    config: Config
    engine: EngineClient
    metrics: Metrics
    admission: Admission
    bodies: Bodies
    console: Console
    state: State = "loading"
    stage: str = "starting"
    progress: float = 0.0
    model: ServedModel | None = None
    grammars: GrammarChecker = field(default_factory=GrammarChecker)
    unknown_fields: set[str] = field(default_factory=set)
    """Unknown request fields already logged."""
    began_s: float = field(default_factory=time.monotonic)
    failures: int = 0
    """Engines that ended after one had served, and were started again."""
    last_failure: tuple[float, str, str] | None = None
    """Of the last of them: when on the monotonic clock, `reason` as in the metric, and how it ended."""

    def set_state(self, state: State) -> None:
        """Change the state; a server that drains never comes back."""
        if self.state != "draining":
            self.state = state
        self.metrics.ready.set(self.state == "ready")

    def progressed(self, stage: str, fraction: float) -> None:
        """Loading has come so far: what is being done, and what share of it is, 0 to 1."""
        self.stage, self.progress = stage, fraction

    def engine_failed(self, reason: str, how: str) -> None:
        """An engine ended that nobody had asked to; another is started."""
        self.failures += 1
        self.last_failure = (time.monotonic(), reason, how)
        self.progressed("starting", 0.0)

    def summary(self) -> dict[str, object]:
        """What is served and inside what, for the log: bytes."""
        assert self.model is not None
        info = self.model.info
        return {
            "model": self.model.name, "model_type": info.model_type, "dtype": info.dtype, "device": info.device,
            "numerics": info.numerics, "expert_budget_bytes": info.expert_budget_bytes,
            "expert_bytes_total": info.expert_bytes_total, "kv_bytes": info.kv_bytes,
            "memory_budget_bytes": info.memory_budget_bytes, "max_model_len": info.max_model_len,
        }  # fmt: skip

    def serving(self) -> ServedModel:
        """The model, if requests can be taken now. Raises Unavailable saying why not."""
        if self.state == "draining":
            raise Draining
        if self.state == "engine_dead":
            raise EngineDead("the engine process has ended and is being restarted")
        if self.model is None or self.state == "loading":
            raise Unavailable(
                f"the model is loading: {self.stage}, {self.progress:.0%}", code="model_loading", retry_after_s=5
            )
        return self.model

    def check_model(self, name: str, model: ServedModel) -> None:
        """Raises ModelNotFound unless `name` is empty, the one served or, where the operator gave it no other, what the
        operator asked for (`demo`)."""
        asked_for = () if self.config.served_model_name else (self.config.model,)
        if name not in ("", model.name, *asked_for):
            raise ModelNotFound(name, model.name, *(other for other in asked_for if "/" not in other))  # no paths

    def became_ready(self, codec: TextCodec, chat: ChatFormat, info: EngineInfo) -> None:
        """An engine serves: requests are taken from now on."""
        name = self.config.served_model_name or codec.model_name
        loaded = self.model.loaded_unix_s if self.model else int(time.time())
        self.model = ServedModel(name, codec, chat, info, loaded)
        self.metrics.engine_ready(name, info)
        self.console.engine_ready()
        self.set_state("ready")

    def engine_ended(self) -> None:
        """The engine that served does no more."""
        self.metrics.engine_ended()
        self.console.engine_ended()
