"""Runs a pre-gating router: token ids to the experts of every layer, before any layer runs. Owns its own KV layout.

The router is one causal attention block of its own over paged keys and values: one native call where there are kernels,
so that a token's route has the same bits in every batch and for every cut, else its module.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from expertd_engine.kernels.library import KernelsMissing
from expertd_engine.model.attention import ATTENTION_NAME, AttentionBatch
from expertd_engine.model.kv_storage import KVStorage, LayerShape
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.native_router import NativeRouter
from expertd_engine.model.native_witness import NotMatched
from expertd_engine.model.numerics import ROW_MULTIPLE
from expertd_engine.model.step_routes import KnownRoutes
from expertd_engine.model.step_rows import Span
from expertd_engine.paths import PathShape, Routes

_JUDGED = 37
"""Tokens of the probe that holds the native router to its module."""
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Allowed error of the probe's logits, relative to their size."""


class Begun(Protocol):
    """One token of each of some sequences, being routed. `finish` is called once for each beginning, before anything
    else is routed."""

    def finish(self) -> Routes:
        """Waits. The routes stand until `again`. Raises what `Routing.route` raises."""
        ...

    def again(self, token_ids: Sequence[int]) -> None:
        """Begin with the next token of each, over the same blocks."""
        ...


class Routing(Protocol):
    """Who chooses."""

    def route(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> Routes:
        """Experts of every token, rows as in `StepModel.forward`, and logits. The router's keys and values go into the
        last layer of `storage`."""
        ...

    def begin(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> Begun:
        """`route` with one row for each span, beside the caller if that helps."""
        ...


class Pregate:
    """A model's router. `path_shape` says what a token's choice looks like, `scored_shape` with what the router gave
    all experts; `kv_shape` is what the router stores."""

    def __init__(self, router: Routing, path_shape: PathShape, experts: int, kv_shape: LayerShape) -> None:
        """`experts`: how many each head chooses among."""
        self.path_shape = path_shape
        self.scored_shape = replace(path_shape, kept_logits=path_shape.heads * experts)
        self.kv_shape = kv_shape
        self.route = router.route
        self.begin = router.begin

    def known(self, parts: Iterable[Routes]) -> KnownRoutes:
        """As the layers read them, one part behind the other."""
        all_parts = Routes.blank(0, 0, 0)
        for part in parts:
            all_parts.experts.extend(part.experts)
            all_parts.weights.extend(part.weights)
            all_parts.logits.extend(part.logits)
        return KnownRoutes(all_parts, self.path_shape)


def build_pregate(loaded: LoadedModel, max_positions: int) -> tuple[Pregate, str | None]:
    """The router of a pre-gated model, and why it is not native (None if it is)."""
    module: Any = loaded.pregating
    config = loaded.model.config
    path_shape = PathShape(int(config.router_heads), int(config.num_experts_per_tok))
    dim = module.attention.head_dim
    kv_shape = LayerShape(module.attention.heads, 1, dim, dim)
    own = ModuleRouter(loaded, path_shape)
    try:
        native = NativeRouter(loaded, path_shape, max_positions)
        _judge(native, own, kv_shape, loaded)
    except (NotMatched, KernelsMissing) as error:
        return Pregate(own, path_shape, int(config.num_experts), kv_shape), str(error)
    return Pregate(native, path_shape, int(config.num_experts), kv_shape), None


class ModuleRouter:
    """The router through its module, with our attention behind it."""

    def __init__(self, loaded: LoadedModel, shape: PathShape) -> None:
        self._embed = loaded.model.get_input_embeddings()
        self._module: Any = loaded.pregating
        self._shape = shape

    def route(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> Routes:
        """As `Routing.route`."""
        logits = self.logits(token_ids, positions, spans, storage)
        each, top_k = logits.view(len(logits), self._shape.heads, -1), self._shape.top_k
        if top_k == 1:  # the only choice has all the weight
            index = each.argmax(dim=-1, keepdim=True)
            weights = torch.ones(index.shape)
        else:
            chosen, index = each.softmax(dim=-1).topk(top_k, dim=-1)
            weights = chosen / chosen.sum(dim=-1, keepdim=True)
        floats = (array("f", part.contiguous().numpy().tobytes()) for part in (weights, logits))
        return Routes(array("q", index.numpy().tobytes()), *floats)

    def begin(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> Begun:
        """Nothing beside the caller: a module's Python would only stand in its way."""
        return _BegunByModule(self, token_ids, positions, spans, storage)

    def logits(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> Tensor:
        """`[T, outputs]` in float32."""
        batch = _LastLayer(spans, storage)
        with torch.inference_mode():
            embeddings = self._embed(_padded(token_ids)[None])
            logits = self._module(embeddings, _padded(positions)[None], None, None, ATTENTION_NAME, expertd_batch=batch)
        return logits[0, : len(token_ids)].float()  # type: ignore[no-any-return]  # nn.Module's call


class _BegunByModule:
    def __init__(
        self, router: ModuleRouter, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span],
        storage: KVStorage,
    ) -> None:  # fmt: skip
        self._router, self._token_ids, self._positions = router, token_ids, positions
        self._spans, self._storage = spans, storage

    def finish(self) -> Routes:
        return self._router.route(self._token_ids, self._positions, self._spans, self._storage)

    def again(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        self._positions = [position + 1 for position in self._positions]
        self._spans = [replace(span, start=span.start + 1) for span in self._spans]


class _LastLayer(AttentionBatch):
    """Attention over the last layer of a storage, whatever number the module has."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return super().attend(len(self.storage.keys) - 1, query, key, value, scale, window, sinks)


def _judge(native: NativeRouter, module: ModuleRouter, kv_shape: LayerShape, loaded: LoadedModel) -> None:
    """Raise NotMatched unless `native` has the module's logits on a probe, but for rounding."""
    token_ids = [(7919 * i + 13) % loaded.vocab_size for i in range(_JUDGED)]
    spans = [Span(0, 0, _JUDGED, list(range(1, 4)))]
    probe = token_ids, range(_JUDGED), spans
    expected = module.logits(*probe, KVStorage([kv_shape], 4, 16, loaded.dtype))
    routes = native.route(*probe, KVStorage([kv_shape], 4, 16, loaded.dtype))
    logits = torch.frombuffer(routes.logits, dtype=torch.float32).view_as(expected)
    error = float((logits - expected).norm() / expected.norm())
    if not error <= _TOLERANCES[loaded.dtype]:
        raise NotMatched(f"the router differs from its module by {error:.2g}; allowed is {_TOLERANCES[loaded.dtype]}")


def _padded(values: Sequence[int]) -> Tensor:
    return torch.tensor([*values, *[0] * (-len(values) % ROW_MULTIPLE)], dtype=torch.long)
