"""Engines whose steps run on a card, or on the processor in its place, over stores in the order that cards read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from expertd_engine.model.cuda_runner import DeviceRunner

from expertd_engine.bench.generated import GeneratedRoutes
from expertd_engine.core import Forward
from expertd_engine.experts.lookahead import Lookahead
from expertd_engine.experts.store import ExpertStore
from expertd_engine.prepare import prepare
from support.engine import make_config
from support.tiny_checkpoints import make_checkpoint

SEED = 4


def make_store(family: str, folder: Path, experts_format: str = "float32") -> ExpertStore:
    """A tiny family's store for cards."""
    make_checkpoint(family, folder / "checkpoint", SEED)
    return prepare(folder / "checkpoint", folder / "store", experts_format, order="rows")


@contextmanager
def device_engine(
    store: ExpertStore, device: str, lookahead: Lookahead | None = None, routes: GeneratedRoutes | None = None, /,
    **options: Any,
) -> Iterator[Any]:  # fmt: skip
    """A `DeviceEngine` over `store`; `device` is `cpu` or `cuda:0`. `lookahead`: what foresees instead of nobody;
    `routes`: of one stream, instead of the routers'."""
    from expertd_engine.device_startup import start_on_device  # needs triton

    config = make_config(**{"max_sequences": 4, "max_step_tokens": 48, "threads": 1, **options})
    at = torch.device(device)

    def announced(runner: DeviceRunner) -> Forward:
        if routes is not None:
            runner.beginning = lambda plan: routes.begin_step([(0, sum(chunk.num_tokens for chunk in plan.chunks))])
        return runner

    engine = start_on_device(
        store, config, os.getpid(), lambda stage, fraction: None, announced, at, lookahead=lookahead, routes=routes
    )
    try:
        yield engine
    finally:
        engine.cache.close()
