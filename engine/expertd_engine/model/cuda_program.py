"""What a step is on the device: which kernel runs after which, on buffers that never move. Launches; never waits.

The residual stream and all sums are float32. One program serves every number of rows: up to a bucket's rows it is
captured as a CUDA graph, above it runs as it stands, with experts that come layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from expertd_engine.kernels.cuda.attention import QUERY_TILE, AttentionScratch, attend
from expertd_engine.kernels.cuda.block import Argmax, activate, store_qkv
from expertd_engine.kernels.cuda.dense import Form, embed, matmul
from expertd_engine.kernels.cuda.matrices import DeviceMatrix
from expertd_engine.kernels.cuda.norms import DeviceNorm, add_norm, norm_rows
from expertd_engine.kernels.cuda.router import route
from expertd_engine.kernels.cuda.substitute import Among
from expertd_engine.model.cuda_inputs import StepInputs
from expertd_engine.model.cuda_kv import DeviceKV
from expertd_engine.model.cuda_layer import DeviceEnds, DeviceFeedForward, DeviceLayer
from expertd_engine.model.cuda_virtual import VirtualWork
from expertd_engine.model.numerics import InvariantSigmoids
from expertd_engine.model.step_rows import Span


class Experts(Protocol):
    """Who computes the routed experts of a step."""

    def add(self, moe: int, x: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
        """Add the experts that `index` `[R, K]` names of MoE layer `moe`, times `weights`, for rows `x` `[R, H]` to
        float32 `out` `[R, H]`. Launches; never waits."""
        ...


class StepProgram(Protocol):
    """A model's dense side over one KV pool and buffers that never move."""

    hidden: Tensor
    """`[rows, H]`: the residual stream."""
    logits: Tensor
    """`[N, V]`: room for the logits of N rows at a time."""

    def run_layers(
        self, rows: int, experts: Experts, tiles: Tensor | None = None, virtual: VirtualWork | None = None
    ) -> None:
        """From the step's inputs to the residual stream behind the last layer, for the first `rows` rows.

        `tiles` `[n, 2]`: first row and length of runs of consecutive rows of one sequence, for steps of many rows.
        `virtual`: rows go to held experts, which takes routers that a kernel selects for.
        """
        ...

    def run_head(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits `[n, V]` of rows `hidden` `[n, H]` of the residual stream, and the best token of each."""
        ...


class DenseSide(Protocol):
    """All of a model but its routed experts, on a device."""

    is_graph: bool
    """Whether its programs may be captured."""
    vocabulary: int
    device: torch.device
    no_virtual: str | None
    """Why its routers cannot choose among held experts; None where they can."""

    def program(self, room: ProgramRoom, *, invariant: bool) -> StepProgram:
        """`invariant`: a row's bits depend on its own sequence alone, at the price of prompts computed row by row."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ProgramRoom:
    """What a program works on. `rows` of the largest step, `alone` of the largest that attends row by row."""

    kv: DeviceKV
    inputs: StepInputs
    logits: Tensor
    """`[N, V]`"""
    hidden: int
    rows: int
    alone: int
    dtype: torch.dtype
    """Of rows that matrices read."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The widest of each kind of row over all layers."""

    hidden: int
    projections: int
    queries: int
    attended: int
    gate_up: int
    inner: int
    experts: int
    top_k: int
    vocabulary: int

    @classmethod
    def of(cls, layers: Sequence[DeviceLayer], ends: DeviceEnds) -> Sizes:
        ffns = [layer.ffn for layer in layers if layer.ffn is not None]
        routers = [layer.router for layer in layers if layer.router is not None]
        return cls(
            hidden=layers[0].projections.cols,
            projections=max(layer.projections.rows for layer in layers),
            queries=max(layer.heads.heads * layer.heads.key_dim for layer in layers),
            attended=max(layer.output.cols for layer in layers),
            gate_up=max((ffn.gate_up.rows for ffn in ffns), default=1),
            inner=max((ffn.down.cols for ffn in ffns), default=1),
            experts=max((router.matrix.rows for router in routers), default=1),
            top_k=max((router.top_k for router in routers), default=1),
            vocabulary=ends.head.rows,
        )


class Workspace:
    """Activations of steps of up to `rows` rows. The same memory serves all layers."""

    def __init__(
        self, sizes: Sizes, layers: Sequence[DeviceLayer], rows: int, alone: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        """`alone`: rows of the largest step that attends row by row. `dtype`: of rows that experts and FFNs read."""

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        self.hidden, self.added = floats(rows, sizes.hidden), floats(rows, sizes.hidden)
        self.normed = torch.empty(rows, sizes.hidden, dtype=dtype, device=device)
        self.routed_input = torch.empty_like(self.normed)
        self.projections, self.queries = floats(rows, sizes.projections), floats(rows, sizes.queries)
        self.attended = floats(rows, sizes.attended)
        self.gate_up = floats(rows * sizes.gate_up)
        self.inner = torch.empty(rows * sizes.inner, dtype=dtype, device=device)
        gates = any(layer.ffn_gate is not None for layer in layers)
        self.shared, self.share = floats(rows if gates else 0, sizes.hidden), floats(rows, 1)
        self.router_logits = floats(rows * sizes.experts)
        self.index = torch.zeros(rows * sizes.top_k, dtype=torch.int32, device=device)
        self.weights = floats(rows * sizes.top_k)
        self.counter = torch.zeros(rows, dtype=torch.int32, device=device)
        heads = [layer.heads for layer in layers]
        self.attention = AttentionScratch.of(
            alone, max(one.heads for one in heads), max(one.kv_heads for one in heads),
            max(one.value_dim for one in heads), device,
        )  # fmt: skip


class Program:
    """The layers of one model over one KV pool and one workspace."""

    def __init__(
        self, layers: Sequence[DeviceLayer], ends: DeviceEnds, kv: DeviceKV, inputs: StepInputs, workspace: Workspace,
        logits: Tensor, *, invariant: bool = False,
    ) -> None:  # fmt: skip
        """`logits` `[N, V]`: room for the logits of N rows at a time. `invariant`: see `DenseSide.program`."""
        self.layers, self.ends = layers, ends
        self.kv, self.inputs, self.workspace, self.logits = kv, inputs, workspace, logits
        self.hidden = workspace.hidden
        self._invariant = invariant
        self._form: Form = "rows" if invariant else "auto"
        self._argmax = Argmax(len(logits), logits.shape[1], logits.device)

    def run_layers(
        self, rows: int, experts: Experts, tiles: Tensor | None = None, virtual: VirtualWork | None = None
    ) -> None:
        """See `StepProgram`."""
        hidden = self.workspace.hidden[:rows]
        embed(self.ends.embedding, self.inputs.ids[:rows], self.ends.embedding_scale, hidden)
        for index, layer in enumerate(self.layers):
            self._attention(index, layer, hidden, tiles)
            self._feed_forward(layer, hidden, experts, virtual)

    def run_head(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `StepProgram`."""
        ends, logits = self.ends, self.logits[: len(hidden)]
        self._multiply(
            hidden, ends.head, logits,
            norm=ends.norm, scale=ends.logit_scale, normed=self.workspace.normed[: len(hidden)],
        )  # fmt: skip
        self._argmax(logits, tokens[: len(hidden)])
        return logits

    def _multiply(self, x: Tensor, matrix: DeviceMatrix, out: Tensor, **options: Any) -> None:
        matmul(x, matrix, out, form=self._form, **options)

    def _attention(self, index: int, layer: DeviceLayer, hidden: Tensor, tiles: Tensor | None) -> None:
        work, inputs, rows = self.workspace, self.inputs, len(hidden)
        made = work.projections[:rows, : layer.projections.rows]
        normed, queries = work.normed[:rows], work.queries[:rows, : layer.heads.heads * layer.heads.key_dim]
        keys, values = self.kv.keys[index], self.kv.values[index]
        places = inputs.positions[:rows], inputs.row_table[:rows], inputs.tables
        if layer.parallel:  # attention and FFN read the same rows, from before either has added to the stream
            assert layer.input_norm is not None
            norm_rows(hidden, layer.input_norm, work.routed_input[:rows])
            self._multiply(work.routed_input[:rows], layer.projections, made)
        else:
            self._multiply(hidden, layer.projections, made, norm=layer.input_norm, normed=normed)
        store_qkv(made, layer.heads, queries, keys, values, *places)
        attended = work.attended[:rows, : layer.output.cols]
        gate = made[:, layer.projections.rows - layer.gate_width :] if layer.gate_width else None
        attend(
            queries, keys, values, inputs.tables, inputs.row_table[:rows], inputs.positions[:rows], attended,
            work.attention, window=layer.window, sinks=layer.sinks, gate=gate, tiles=None if self._invariant else tiles,
        )  # fmt: skip
        if layer.attention_norm is None:
            self._multiply(attended, layer.output, hidden, add=True, scale=layer.attention_residual)
        else:
            self._multiply(attended, layer.output, work.added[:rows])
            add_norm(hidden, work.added[:rows], layer.attention_norm, layer.attention_residual)

    def _feed_forward(self, layer: DeviceLayer, hidden: Tensor, experts: Experts, virtual: VirtualWork | None) -> None:
        """Add the layer's FFN to `hidden`: straight, where nothing comes between the sum and the stream."""
        rows = len(hidden)
        straight = layer.output_norm is None and layer.ffn_residual == 1.0
        out = hidden if straight else self.workspace.added[:rows].zero_()
        y = self.workspace.routed_input[:rows]
        if layer.router is not None:
            assert layer.moe is not None
            among = None if virtual is None else virtual.among(layer.moe, rows)
            index, weights = self._route(layer, hidden, y, among)
            experts.add(layer.moe, y, index, weights, out)
        elif not layer.parallel:
            self._normed(hidden, layer.ffn_norm, y)
        if layer.ffn is not None:
            self._shared(layer.ffn, layer, y, out)
        if not straight:
            add_norm(hidden, out, layer.output_norm, layer.ffn_residual)

    def _route(self, layer: DeviceLayer, hidden: Tensor, y: Tensor, among: Among | None) -> tuple[Tensor, Tensor]:
        """Experts and weights `[R, K]`, or those that compute in their place; and `y`, the rows that experts read."""
        work, router, rows = self.workspace, layer.router, len(hidden)
        assert router is not None
        logits = work.router_logits[: rows * router.matrix.rows].view(rows, -1)
        index = work.index[: rows * router.top_k].view(rows, -1)
        weights = work.weights[: rows * router.top_k].view(rows, -1)
        x, before = (y, None) if layer.parallel else (hidden, layer.ffn_norm)
        if router.rule is not None:
            route(x, before, router.rule, logits, index, weights, y, work.counter[:rows], among)
            return (index, weights) if among is None else (among.experts, among.weights)
        assert router.select is not None and among is None
        self._normed(x, before, y)
        self._multiply(x, router.matrix, logits, norm=before, normed=work.normed[:rows])
        with InvariantSigmoids():
            chosen, shares = router.select(logits, None)
        index.copy_(chosen)
        weights.copy_(shares)
        return index, weights

    def _normed(self, x: Tensor, norm: DeviceNorm | None, y: Tensor) -> None:
        """y = norm(x), unless they are the same already."""
        if norm is not None:
            norm_rows(x, norm, y)
        elif x.data_ptr() != y.data_ptr():
            y.copy_(x)

    def _shared(self, ffn: DeviceFeedForward, layer: DeviceLayer, y: Tensor, out: Tensor) -> None:
        work, rows = self.workspace, len(y)
        gate_up = work.gate_up[: rows * ffn.gate_up.rows].view(rows, -1)
        inner = work.inner[: rows * ffn.down.cols].view(rows, -1)
        self._multiply(y, ffn.gate_up, gate_up)
        middle = ffn.down.cols if ffn.gated else 0
        gate = gate_up[:, :middle] if ffn.gated else None
        activate(gate, gate_up[:, middle:], inner, ffn.activation, ffn.alpha, ffn.limit)
        if layer.ffn_gate is None:
            self._multiply(inner, ffn.down, out, add=True)
            return
        made, share = work.shared[:rows], work.share[:rows]
        self._multiply(inner, ffn.down, made)
        self._multiply(y, layer.ffn_gate, share)
        add_norm(out, made, None, 1.0, gate=share)


class KernelLayers:
    """A `DenseSide` whose every layer our kernels compute."""

    is_graph = True

    def __init__(self, layers: Sequence[DeviceLayer], ends: DeviceEnds) -> None:
        self._layers, self._ends = layers, ends
        by_kernels = all(layer.router is None or layer.router.rule is not None for layer in layers)
        self.no_virtual = None if by_kernels else "no kernel knows by what rule its routers select"
        self.vocabulary, self.device = ends.head.rows, ends.head.data.device

    def program(self, room: ProgramRoom, *, invariant: bool) -> Program:
        """See `DenseSide`."""
        sizes = Sizes.of(self._layers, self._ends)
        work = Workspace(sizes, self._layers, room.rows, room.alone, room.dtype, self.device)
        return Program(self._layers, self._ends, room.kv, room.inputs, work, room.logits, invariant=invariant)


def query_tiles(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """`(first row, rows)` of runs of at most `QUERY_TILE` rows of one sequence."""
    return [
        (row, min(QUERY_TILE, span.row + span.length - row))
        for span in spans
        for row in range(span.row, span.row + span.length, QUERY_TILE)
    ]
