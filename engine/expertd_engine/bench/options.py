"""What the benchmarks are told on the command line, as values; and the processes that follow from it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from expertd_engine.bench.channel import PREDICTORS, make_channel
from expertd_engine.bench.contender import Contender
from expertd_engine.bench.gguf_model import peer_file, write_gguf
from expertd_engine.bench.protocol import EngineSpec, PeerSpec
from expertd_engine.bench.routing import make_routing, shape_of
from expertd_engine.config import parse_size
from expertd_engine.errors import UsageError
from expertd_engine.experts.store import ExpertStore


def _is_on(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(f"{text!r} is neither on nor off")
    return text == "on"


_VARIABLES: dict[str, Callable[[str], Any]] = {
    "policy": str,
    "routing": str,
    "hints": str,
    "expert_budget": str,
    "prefetch": _is_on,
    "io_threads": int,
    "threads": int,
}
"""What `--versus` may change, and how it is read."""


@dataclass(frozen=True, slots=True)
class Options:
    """Of all benchmarks that start engines."""

    engine: EngineSpec
    pairs: int
    prompt: int
    tokens: int
    warm: int
    peer: str | None
    versus: EngineSpec | None
    cgroup: bool
    timeout_s: float

    @property
    def store(self) -> ExpertStore:
        return ExpertStore.open(Path(self.engine.store))

    @property
    def threads(self) -> int:
        """That compute."""
        return self.engine.threads or len(os.sched_getaffinity(0))

    @property
    def limit_bytes(self) -> int | None:
        """Of the cgroup, where one is asked for. Raises UsageError without a memory budget."""
        if not self.cgroup:
            return None
        if self.engine.memory_budget is None:
            raise UsageError("--cgroup needs --memory-budget: that is the cgroup's size")
        return parse_size(self.engine.memory_budget).resolve(0)

    def ours(self) -> Contender:
        """The engine as asked for."""
        return Contender(self.engine, limit_bytes=self.limit_bytes, timeout_s=self.timeout_s)

    def unlimited(self) -> Contender:
        """The same engine without any budget."""
        free = msgspec.structs.replace(self.engine, expert_budget=None, memory_budget=None)
        return Contender(free, timeout_s=self.timeout_s)

    def variant(self) -> Contender | None:
        """The engine with what `--versus` changes, limited alike."""
        if self.versus is None:
            return None
        return Contender(self.versus, limit_bytes=self.limit_bytes, timeout_s=self.timeout_s)

    def peer_contender(self) -> Contender | None:
        """llama.cpp on the store's GGUF twin, which is written first where it is not there; limited alike."""
        if self.peer is None:
            return None
        if self.peer != "llamacpp":
            raise UsageError(f"--peer {self.peer} is not allowed on cpu: give llamacpp, or --device cuda")
        path = peer_file(self.store)
        if not path.is_file():
            write_gguf(self.store, path)
        if self.cgroup:
            _forget_pages(path)
        engine = self.engine
        spec = PeerSpec(str(path), engine.streams, engine.threads, engine.max_model_len, engine.seed)
        return Contender(spec, limit_bytes=self.limit_bytes, timeout_s=self.timeout_s)


def _check(spec: EngineSpec) -> None:
    """Raise UsageError for routes or hints that the engine would refuse once it has started."""
    routing = make_routing(spec.routing, shape_of(ExpertStore.open(Path(spec.store)).index), spec.seed)
    if spec.hints in PREDICTORS and routing is not None:
        raise UsageError(f"hints {spec.hints!r} are for the model's own routes: give --routing model")
    if make_channel(spec.hints) is not None and routing is None:
        raise UsageError(f"hints {spec.hints!r} need generated routes: give --routing other than model")


def _changed(spec: EngineSpec, changes: str | None) -> EngineSpec | None:
    if changes is None:
        return None
    return msgspec.structs.replace(spec, **dict(_change(part) for part in changes.split(",")))


def _change(part: str) -> tuple[str, Any]:
    name, _, value = part.partition("=")
    name = name.strip().replace("-", "_")
    if name not in _VARIABLES or not value:
        raise UsageError(f"--versus {part!r} is not allowed: give NAME=VALUE with one of {', '.join(_VARIABLES)}")
    try:
        return name, _VARIABLES[name](value)
    except ValueError as error:
        raise UsageError(f"--versus {part!r} is not allowed: {error}") from None


def _forget_pages(path: Path) -> None:
    """Have the file's page cache dropped: what another group has paid for would be the peer's for nothing."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_options(arguments: argparse.Namespace, store: Path) -> Options:
    """The command line as a value. Raises UsageError for what does not go together."""
    if arguments.expert_budget and arguments.memory_budget:
        raise UsageError("give --expert-budget or --memory-budget, not both: each decides how many experts fit")
    engine = EngineSpec(
        store=str(store),
        expert_budget=arguments.expert_budget,
        memory_budget=arguments.memory_budget,
        policy=arguments.policy,
        prefetch=not arguments.no_prefetch,
        routing=arguments.routing,
        hints=arguments.hints,
        streams=_one(arguments.streams),
        threads=arguments.threads,
        io_threads=arguments.io_threads,
        max_step_tokens=arguments.max_step_tokens,
        max_model_len=_context(arguments),
        seed=arguments.seed,
        device=arguments.device,
        device_misses=arguments.device_misses,
    )
    versus = _changed(engine, arguments.versus)
    for one in (engine, versus or engine):
        _check(one)
    return Options(
        engine=engine,
        pairs=arguments.pairs,
        prompt=arguments.prompt,
        tokens=arguments.tokens,
        warm=arguments.warm,
        peer=arguments.peer,
        versus=versus,
        cgroup=arguments.cgroup,
        timeout_s=arguments.timeout,
    )


def _one(streams: list[int]) -> int:
    if len(streams) > 1:
        raise UsageError(f"--streams {'+'.join(map(str, streams))} is not allowed on cpu: give one number")
    return streams[0]


def _context(arguments: argparse.Namespace) -> int:
    """Tokens that the longest sequence of any run may reach, in whole blocks."""
    longest = arguments.prompt + 4 * arguments.warm + arguments.tokens + 2 * _one(arguments.streams) + 64
    return int(-(-longest // 64) * 64)
