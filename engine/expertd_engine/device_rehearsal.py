"""A device's model before anybody asks: made, measured over next to nothing, warmed, tried for what it promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from expertd_engine.device_context import Context
from expertd_engine.device_experts import all_slots_bytes, chunks_of
from expertd_engine.device_memory import DeviceMeter
from expertd_engine.device_misses import rehearsal_mailbox
from expertd_engine.device_virtual import may_be_virtual
from expertd_engine.errors import ConfigError
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_staging import Chunk
from expertd_engine.kernels.cuda.host_experts import Mailbox
from expertd_engine.kernels.cuda.resolve import TablePointers
from expertd_engine.memory import available_bytes
from expertd_engine.model.cuda_kv import DeviceKV
from expertd_engine.model.cuda_model import DeviceModel, StepTokens
from expertd_engine.model.cuda_trial import is_invariant
from expertd_engine.model.step_rows import Span
from expertd_engine.planning.startup_plan import Measured
from expertd_engine.startup_parts import BLOCK_TOKENS

Report = Callable[[str, float], None]


class _EmptyTable:
    """A table of no expert, for trial steps whose rows are all padding."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        def words(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.pointers = TablePointers(
            entries=words(layers, experts, 2, dtype=torch.int64), slot_address=words(1, dtype=torch.int64),
            ready=words(1), landing=words(2), head=words(1), tail=words(1),
            seen=words(layers, experts, 4), seen_count=words(layers), progress=words(1), launch=words(1),
        )  # fmt: skip
        self.held = words(layers, experts)

    def apply(self) -> None:
        """Nothing changes."""


class _NoExperts:
    """A `StageSource` of none: what routers choose adds nothing."""

    def __init__(self, device: torch.device) -> None:
        def none(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(0, dtype=dtype, device=device)

        self._chunk = Chunk((), none(torch.int32), none(torch.int64))

    def stage(self, *, held_alone: bool) -> AbstractContextManager[_NoExperts]:
        return nullcontext(self)

    def resident(self, layer: int) -> Chunk:
        return self._chunk

    def chunks(self, layer: int, counts: torch.Tensor) -> Iterator[Chunk]:
        return iter(())

    def scanned(self, pairs: Sequence[Sequence[int]]) -> None:
        """Nobody wants to know."""


def make_model(context: Context, kv: DeviceKV, table: Any, mailbox: Mailbox | None = None) -> DeviceModel:
    """The model over keys and values and a table of experts, graphs captured. `mailbox`: see `DeviceModel`."""
    invariant = context.config.numerics == "invariant"
    given = context.routes is not None
    return DeviceModel(
        context.parts, kv, table, context.limits, given_routes=given, invariant=invariant, mailbox=mailbox,
        virtual=may_be_virtual(context),
    )  # fmt: skip


def measure(context: Context) -> Measured:
    """With everything on the device but experts and keys and values: a model over one block, graphs captured."""
    index, parts, where = context.store.index, context.parts, context.device.torch_device
    kv = DeviceKV(parts.shapes, 2, BLOCK_TOKENS, parts.dtype, context.device)
    if where.type == "cuda" or parts.not_matched:
        table = _EmptyTable(len(index.layers), parts.experts, where)
        model = make_model(context, kv, table, rehearsal_mailbox(context))
        if parts.not_matched:  # what modules allot on their way is theirs to say
            model.step_by_layers(_largest_probe(context), _NoExperts(where))
        del model
    used = context.meter.measure().used_bytes
    kv.free()
    free = context.meter.free_bytes() if isinstance(context.meter, DeviceMeter) else available_bytes()
    return Measured(
        base=used,
        step=_largest_step_bytes(context),
        experts_minimum=chunks_of(context).bytes_of(2),
        experts_total=all_slots_bytes(context),
        kv_block=kv.block_bytes,
        block_tokens=BLOCK_TOKENS,
        available=free,
    )


def _largest_step_bytes(context: Context) -> int:
    """What a step of many rows allots besides its buffers, for a moment: sorted pairs and the like, several times."""
    pairs = context.limits.rows * context.store.index.top_k
    return 64 * pairs


def warm_up(context: Context, model: DeviceModel, cache: DeviceCache, report: Report) -> None:
    """Fill slots; then a prompt as long as a step, then one token: what is compiled at first use is there when a
    request comes, and what the largest step allots for a moment is allotted.
    """
    cache.fill()
    if context.device.torch_device.type == "cpu":
        return  # nothing is compiled
    largest = _largest_probe(context)
    probes = [largest, _probe(context, len(largest.ids) - 1, 1)]
    if model.virtual is not None:
        probes.append(replace(largest, limits=[0.0] * len(largest.ids)))  # nobody is held: they keep their own experts
    for probe in probes:
        cache.begin_step((), scan=True)
        model.step(probe, cache)
        cache.end_step()
    report("allot", 1.0)


def _largest_probe(context: Context) -> StepTokens:
    return _probe(context, 0, min(context.limits.step_tokens, context.limits.model_len))


def _probe(context: Context, first: int, length: int) -> StepTokens:
    """Its keys and values are no one's, and overwrite each other in one block."""
    index, blocks = context.store.index, [1] * -(-(first + length) // BLOCK_TOKENS)
    routes = np.tile(np.arange(index.top_k), (length, len(index.layers), 1))
    return StepTokens(
        [0] * length, range(first, first + length), [Span(0, first, length, blocks)], [length - 1],
        routes=None if context.routes is None else routes,
    )  # fmt: skip


def try_numerics(context: Context, model: DeviceModel, cache: DeviceCache) -> str:
    """`invariant` where that is asked for and holds, by trial. Raises ConfigError where it does not."""
    if context.config.numerics != "invariant":
        return "per-batch" if cache.computing is None else "per-residency"
    if not is_invariant(model, cache, context.limits, BLOCK_TOKENS):
        raise ConfigError("numerics: 'invariant' is not allowed: on this device a row's bits depend on its batch")
    return "invariant"
