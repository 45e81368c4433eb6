"""What the benchmarks are told on the command line, as values; and the processes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from expertd_engine.bench.contender import Contender
from expertd_engine.bench.protocol import EngineSpec, PeerSpec
from expertd_engine.config import parse_size
from expertd_engine.errors import UsageError
from expertd_engine.experts.store import ExpertStore

VARIABLES = {"policy": str, "routing": str, "hints": str, "expert_budget": str, "prefetch": lambda text: text == "on"}
"""What `--versus` may change."""


@dataclass(frozen=True, slots=True)
class Options:
    """Of all benchmarks that start engines."""

    engine: EngineSpec
    pairs: int
    prompt: int
    tokens: int
    warm: int
    peer: str | None
    versus: str | None
    cgroup: bool
    timeout_s: float

    @property
    def store(self) -> ExpertStore:
        return ExpertStore.open(Path(self.engine.store))

    @property
    def limit_bytes(self) -> int | None:
        """Of the cgroup, where one is asked for. Raises UsageError without a memory budget."""
        if not self.cgroup:
            return None
        if self.engine.memory_budget is None:
            raise UsageError("--cgroup needs --memory-budget: that is the cgroup's size")
        return parse_size(self.engine.memory_budget).resolve(0)
