"""A layer and a step as native code reads them: descriptors, and the memory that their addresses point to."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd_engine.kernels.library import FORMATS
from expertd_engine.model.kv_storage import KVStorage
from expertd_engine.model.native_abi import Block, Step
from expertd_engine.model.router_kinds import RouterAdapter
from expertd_engine.model.step_rows import Span


@dataclass(eq=False)
class NativeLayer:
    """One decoder layer. `keep` holds what `block`'s addresses point to."""

    block: Block
    moe: int | None
    """Which MoE layer it is; None: dense."""
    router: RouterAdapter | None
    """Who selects, where the native path gives logits alone."""
    keep: Sequence[Tensor]


class Activations:
    """One step's memory, for `rows` tokens."""

    def __init__(self, rows: int, hidden: int, layers: Sequence[NativeLayer]) -> None:
        self.rows = rows
        self.hidden = torch.empty(rows, hidden)
        self.normed = torch.empty(rows, hidden)
        self.added = torch.empty(rows, hidden)
        self.routed = torch.zeros(rows, hidden)
        self.logits = torch.empty(rows * max(layer.block.router.experts for layer in layers))
        choices = max(layer.block.router.top_k for layer in layers)
        self.experts = torch.empty(rows * choices, dtype=torch.int64)
        self.weights = torch.empty(rows * choices)
        self.routes = [self._routes(layer.block) for layer in layers]
        """Each layer's logits `[T, E]`, experts and weights `[T, K]`: the same memory for all."""

    def _routes(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        def first(memory: Tensor, width: int) -> Tensor:
            return memory[: self.rows * width].view(self.rows, width)

        router = block.router
        return (
            first(self.logits, router.experts),
            first(self.experts, router.top_k),
            first(self.weights, router.top_k),
        )


class StepMemory:
    """One step as native code reads it, and everything that its addresses point to."""

    def __init__(
        self, activations: Activations, positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> None:
        self.activations = activations
        tables: list[int] = []
        starts: list[int] = []
        for span in spans:
            starts.append(len(tables))
            tables += span.blocks
        self._arrays = (
            array("q", positions),
            array("q", [*(span.row for span in spans), len(positions)]),
            array("q", starts),
            array("i", tables),
        )
        at = [one.buffer_info()[0] for one in self._arrays]
        memory = activations
        self.step = Step(
            *(len(positions), at[0], len(spans), at[1], at[2], at[3]),
            *(storage.address, storage.block_bytes, storage.block_tokens),
            FORMATS[str(storage.dtype).removeprefix("torch.")],
            *(t.data_ptr() for t in (memory.hidden, memory.normed, memory.added)),
            *(t.data_ptr() for t in (memory.logits, memory.experts, memory.weights)),
        )
        self.address = ctypes.addressof(self.step)
