"""Tiny models on the device path, interpreted on the CPU: everything but the routed experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertd_engine.experts.device_streams import HostDevice
from expertd_engine.kernels.library import Pool
from expertd_engine.model.cuda_inputs import StepInputs
from expertd_engine.model.cuda_kv import DeviceKV
from expertd_engine.model.cuda_layer import Carrier
from expertd_engine.model.cuda_program import Program, Sizes, Workspace, query_tiles
from expertd_engine.model.native_build import build_native
from expertd_engine.model.step_rows import Span
from support.native_models import CONTEXT, load_tiny, shapes_of

BLOCK = 16
LARGEST = 96
"""Rows of the largest step."""


class StandIn:
    """The device's `Experts` as `support.native_models.ExactExperts` has it."""

    def add(self, moe: int, x: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
        for choice in range(index.shape[1]):
            out += x.float() * (weights[:, choice] * (1.0 + index[:, choice] / 8))[:, None]


class TinyDevice:
    """One family's program with KV blocks for `sequences` sequences of `CONTEXT` tokens."""

    def __init__(self, family: str, pool: Pool, sequences: int = 1, dtype: torch.dtype = torch.float32) -> None:
        device = torch.device("cpu")
        loaded = load_tiny(family, pool, dtype)
        shapes = shapes_of(loaded)
        native = build_native(loaded, shapes, BLOCK, CONTEXT)
        carrier = Carrier(device)
        layers, ends = [carrier.layer(layer) for layer in native.layers], carrier.ends(native.ends)
        sizes = Sizes.of(layers, ends)
        per_sequence = CONTEXT // BLOCK
        kv = DeviceKV(shapes, 1 + sequences * per_sequence, BLOCK, dtype, HostDevice())
        self._inputs = StepInputs(LARGEST, sequences, per_sequence, device)
        work = Workspace(sizes, layers, LARGEST, LARGEST, dtype, device)
        logits = torch.empty(LARGEST, sizes.vocabulary)
        self._program = Program(layers, ends, kv, self._inputs, work, logits)
        self.best = torch.zeros(LARGEST, dtype=torch.int64)

    @torch.inference_mode()
    def step(self, parts: Sequence[tuple[int, int, Sequence[int]]], *, tiled: bool = False) -> list[Tensor]:
        """One step of (sequence, start, tokens); each part's logits `[tokens, V]`."""
        spans: list[Span] = []
        row, per_sequence = 0, CONTEXT // BLOCK
        for sequence, start, part in parts:
            blocks = range(1 + sequence * per_sequence, 1 + (sequence + 1) * per_sequence)
            spans.append(Span(row, start, len(part), list(blocks)))
            row += len(part)
        ids = [token for _, _, part in parts for token in part]
        self._inputs.fill(ids, [p for _, start, part in parts for p in range(start, start + len(part))], spans)
        self._inputs.take(self.best)
        tiles = torch.tensor(query_tiles(spans), dtype=torch.int32) if tiled else None
        self._program.run_layers(row, StandIn(), tiles)
        logits = self._program.run_head(self._program.workspace.hidden[:row], self.best)
        return list(logits.clone().split([len(part) for _, _, part in parts]))
