"""The whole model but its routed experts in native code: one call per decoder layer, Python only between them.

The residual stream and all activations are float32 whatever the weights are, where the modules would round to the
weights' type after every operation. A token's logits depend on its own history alone: attention has one form for
prefill and decode, and no sum's order depends on the batch, the chunk or the number of threads (law 7).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from ctypes import byref
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from expertd_engine.kernels.library import Matrix, Pool
from expertd_engine.model.expert_native import NativeExperts
from expertd_engine.model.held_run import NativeSubstitution
from expertd_engine.model.kv_storage import KVStorage
from expertd_engine.model.moe import Later, MoELayer
from expertd_engine.model.native_abi import BlockCalls, Norm, Scores
from expertd_engine.model.native_run import LayerRun, may_run
from expertd_engine.model.native_step import Activations, NativeLayer, StepMemory
from expertd_engine.model.numerics import InvariantSigmoids
from expertd_engine.model.step_routes import KnownRoutes, StepRoutes
from expertd_engine.model.step_rows import Span, StepRows

T = TypeVar("T")

TOKENS_ALIGNED = 16
"""Tokens of a KV block are a multiple of this: a group of keys that is one register lies in one block."""
_KEPT_ROWS = 64
"""Activations of steps up to this size are kept for the next one."""

Experts = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Adds the routed experts of rows `[T, H]`, by experts and weights `[T, K]`, to `[T, H]` (`MoELayer.compute`)."""


@dataclass(eq=False)
class Ends:
    """What stands before the first layer and after the last."""

    embedding: Matrix
    embedding_scale: float
    norm: Norm
    head: Matrix
    logit_scale: float
    keep: Sequence[Tensor]


class NativeModel:
    """Computes steps of one model. Owns descriptors and activations; weights, keys and values are others'."""

    def __init__(self, pool: Pool, layers: Sequence[NativeLayer], ends: Ends) -> None:
        self.pool = pool
        self.calls = BlockCalls(pool.library)
        self._layers = layers
        self._substitutions = [self._substitution(layer) for layer in layers]
        self.ends = ends
        self._hidden = layers[0].block.hidden
        self._storage: KVStorage | None = None
        self._kept: Activations | None = None
        self._run: LayerRun | None = None

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def layers(self) -> Sequence[NativeLayer]:
        """As they were matched, for who computes them elsewhere."""
        return self._layers

    def forward(self, rows: StepRows, storage: KVStorage, layers: Sequence[MoELayer], routes: StepRoutes) -> Tensor:
        """As `StepModel.forward`. Raises what the experts raise, KernelError, and ValueError for a token that the model
        does not have.
        """
        for moe in layers:
            moe.step = routes
        memory = self.begin(rows.ids, rows.positions, rows.spans, storage)
        later: Later | None = None
        if routes.known is not None and routes.known.same_everywhere:
            self._put_routes(routes.known, 0, 0, memory)
        try:
            run = self._layer_run(layers, routes) if may_run(routes, len(rows.ids)) else None
            index = 0
            while index < len(self._layers):
                if run is None:
                    self.run_layer(index, memory, later)
                else:
                    routed = memory.activations.routed.data_ptr()
                    index = run.forward(self.pool, index, later, memory.step, routed, routes)
                later = None
                if index < len(self._layers) and (moe_index := self._layers[index].moe) is not None:
                    if routes.known is not None and not routes.known.same_everywhere:
                        self._put_routes(routes.known, index, moe_index, memory)
                    if routes.reroute is not None:
                        routes.reroute.seen(memory.activations.routes[index][0], self._substitutions[index])
                    later = self._experts(index, layers[moe_index].compute_or_prepare, memory)
                index += 1
            if index == len(self._layers):  # else the run has ended the last layer too
                self.finish(index - 1, memory, later)
                later = None
        finally:
            if later is not None:
                later.abandon()
        self.keep(memory)
        return self.logits(memory, rows.logit_rows)

    def keep(self, memory: StepMemory) -> None:
        """A step has come to its end: the next one may use its memory, unless that is much."""
        if memory.activations.rows <= _KEPT_ROWS:
            self._kept = memory.activations

    def begin(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> StepMemory:
        """Set up a step and look its tokens up."""
        if storage is not self._storage:
            self._bind(storage)
        memory = StepMemory(self._activations(len(token_ids)), positions, spans, storage)
        self.look_up(token_ids, memory)
        return memory

    def look_up(self, token_ids: Sequence[int], memory: StepMemory) -> None:
        """Make the residual stream what stands before the first layer."""
        ids = array("q", token_ids)
        hidden, ends = memory.activations.hidden, self.ends
        self.pool.library.rows(ends.embedding, ids.buffer_info()[0], len(ids), hidden.data_ptr())
        if ends.embedding_scale != 1.0:
            hidden.mul_(ends.embedding_scale)

    def embeddings(self, token_ids: Sequence[int]) -> Tensor:
        """As `StepModel.embeddings`."""
        ids, rows = array("q", token_ids), torch.empty(len(token_ids), self._hidden)
        self.pool.library.rows(self.ends.embedding, ids.buffer_info()[0], len(ids), rows.data_ptr())
        return rows.mul_(self.ends.embedding_scale)

    def run_layer(self, index: int, memory: StepMemory, later: Later | None = None, *, alone: bool = False) -> None:
        """End the layer before, with its experts if those were left for `later`, and run this one up to its routes.

        `alone`: there is none before.
        """
        layer, activations = self._layers[index], memory.activations
        before, routed = None, None
        if index and not alone:
            previous = self._layers[index - 1]
            before = byref(previous.block)
            routed = None if previous.moe is None else activations.routed.data_ptr()
        self.calls.forward(self.pool.address, byref(layer.block), before, _call_of(later), routed, byref(memory.step))
        if later is not None:
            later.computed()
        if layer.router is not None:
            logits, experts, weights = activations.routes[index]
            with InvariantSigmoids():
                chosen, shares = layer.router.select(logits)
            experts.copy_(chosen)
            weights.copy_(shares)

    def run_alone(self, index: int, experts: Experts, memory: StepMemory, known: KnownRoutes | None = None) -> None:
        """One layer from the residual stream to the residual stream, with `experts` for the routed ones."""
        self.run_layer(index, memory, alone=True)
        if (moe_index := self._layers[index].moe) is not None:
            if known is not None:
                self._put_routes(known, index, moe_index, memory)
            self._experts(index, experts, memory)
        self.finish(index, memory)

    def finish(self, index: int, memory: StepMemory, later: Later | None = None) -> None:
        """Make the residual stream the output of layer `index`, which ran last but for what was left for `later`."""
        layer = self._layers[index]
        routed = None if layer.moe is None else memory.activations.routed.data_ptr()
        self.calls.finish(self.pool.address, byref(layer.block), _call_of(later), routed, byref(memory.step))
        if later is not None:
            later.computed()

    def logits(self, memory: StepMemory, rows: Sequence[int]) -> Tensor:
        """`[len(rows), V]` of rows of the residual stream."""
        ends, activations = self.ends, memory.activations
        out = torch.empty(len(rows), ends.head.rows)
        wanted = array("q", rows)
        self.calls.logits(
            *(self.pool.address, byref(ends.norm), byref(ends.head), ends.logit_scale),
            *(activations.hidden.data_ptr(), activations.rows, wanted.buffer_info()[0], len(rows), out.data_ptr()),
        )
        return out

    def _put_routes(self, known: KnownRoutes, index: int, moe_index: int, memory: StepMemory) -> None:
        """What the router of a layer would have left, where there is none."""
        _, experts, weights = memory.activations.routes[index]
        known.put(moe_index, experts, weights)

    def _experts(self, index: int, compute: Callable[[Tensor, Tensor, Tensor, Tensor], T], memory: StepMemory) -> T:
        activations = memory.activations
        _, experts, weights = activations.routes[index]
        return compute(activations.normed, experts, weights, activations.routed)

    def _layer_run(self, layers: Sequence[MoELayer], routes: StepRoutes) -> LayerRun | None:
        """How layers run without Python; None where one needs it to select, or its experts are not native."""
        if any(layer.router is not None for layer in self._layers):
            return None
        if routes.known is not None and not routes.known.same_everywhere:
            return None  # each layer's are put in place before it
        if not all(isinstance(layer.kernel, NativeExperts) for layer in layers):
            return None
        source: Any = routes.source  # may_run has seen that it is an expert cache
        if self._run is None or self._run.source is not source:
            blocks = [layer.block for layer in self._layers]
            self._run = LayerRun(self.calls, blocks, [layer.moe for layer in self._layers], layers, source)
        self._run.begin_step(routes, routes.num_rows)
        return self._run

    def _substitution(self, layer: NativeLayer) -> NativeSubstitution | None:
        """None where Python selects, or there is nothing to select."""
        if layer.block.router.scores not in (Scores.SOFTMAX, Scores.SIGMOID, Scores.CHOSEN):
            return None
        return NativeSubstitution(self.calls.substitute, self.pool, layer.block.router)

    def _bind(self, storage: KVStorage) -> None:
        for layer, (keys, values) in zip(self._layers, storage.offsets, strict=False):  # a router's may follow
            layer.block.key_offset, layer.block.value_offset = keys, values
        self._storage = storage

    def _activations(self, rows: int) -> Activations:
        kept, self._kept = self._kept, None  # a step that fails half way leaves sums behind: not to be used again
        if kept is not None and kept.rows == rows:
            return kept
        return Activations(rows, self._hidden, self._layers)


def _call_of(later: Later | None) -> Any:
    return None if later is None else byref(later.call.call)
