"""Runs a pre-gating router: token ids to the experts of every layer, before any layer runs. Owns its own KV layout.

The router is one causal attention block of its own, run like a decoder layer over paged keys and values: natively where
there are kernels, so that a token's route has the same bits in every batch and for every cut, else by its module.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from ctypes import byref
from typing import Any, Protocol

import torch
from torch import Tensor

from expertd_engine.kernels.library import ACTIVATIONS, KernelsMissing, Matrix, Pool
from expertd_engine.model.attention import ATTENTION_NAME, AttentionBatch, KVStorage, LayerShape, Span
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.moe import KnownRoutes
from expertd_engine.model.native_abi import Block, FeedForward, Norm, NormKind, Rope
from expertd_engine.model.native_match import match_matrix
from expertd_engine.model.native_model import Ends, NativeLayer, NativeModel, StepMemory
from expertd_engine.model.native_witness import NotMatched
from expertd_engine.model.numerics import ROW_MULTIPLE
from expertd_engine.paths import PathShape
from expertd_engine.refactor.router import angles

_EPS = 1e-6
_FEW = 8
"""Rows that one thread routes sooner than others are woken up."""
_JUDGED = 37
"""Tokens of the probe that holds the native router to its module."""
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Allowed error of the probe's logits, relative to their size."""


class RouterLogits(Protocol):
    """Who computes the router's logits."""

    def route_logits(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> Tensor:
        """`[T, outputs]` in float32, rows as in `StepModel.forward`. The router's keys and values go into the last
        layer of `storage`."""
        ...


class Pregate:
    """A model's router. `path_shape` says what a token's choice looks like; `kv_shape` is what the router stores."""

    def __init__(self, router: RouterLogits, path_shape: PathShape, kv_shape: LayerShape) -> None:
        self.path_shape = path_shape
        self.kv_shape = kv_shape
        self._router = router

    def route(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> KnownRoutes:
        """Experts of every token, and the router's keys and values into the last layer of `storage`."""
        logits = self._router.route_logits(token_ids, positions, spans, storage)
        heads, top_k = self.path_shape.heads, self.path_shape.top_k
        each = logits.view(len(logits), heads, -1).transpose(0, 1)
        if top_k == 1:  # the only choice has all the weight
            index = each.argmax(dim=-1, keepdim=True)
            return KnownRoutes(index, torch.ones(index.shape))
        chosen, index = each.softmax(dim=-1).topk(top_k, dim=-1)
        return KnownRoutes(index, chosen / chosen.sum(dim=-1, keepdim=True))


def build_pregate(loaded: LoadedModel, max_positions: int) -> tuple[Pregate, str | None]:
    """The router of a pre-gated model, and why it is not native (None if it is)."""
    module: Any = loaded.pregating
    config = loaded.model.config
    path_shape = PathShape(int(config.router_heads), int(config.num_experts_per_tok))
    dim = module.attention.head_dim
    kv_shape = LayerShape(module.attention.heads, 1, dim, dim)
    router: RouterLogits = ModuleRouter(loaded)
    reason: str | None = None
    try:
        router = _judged(NativeRouter(loaded, max_positions), router, kv_shape, loaded)
    except (NotMatched, KernelsMissing) as error:
        reason = str(error)
    return Pregate(router, path_shape, kv_shape), reason


class ModuleRouter:
    """The router through its module, with our attention behind it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._embed = loaded.model.get_input_embeddings()
        self._module: Any = loaded.pregating

    def route_logits(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> Tensor:
        batch = _LastLayer(spans, storage)
        with torch.inference_mode():
            embeddings = self._embed(_padded(token_ids)[None])
            logits = self._module(embeddings, _padded(positions)[None], None, None, ATTENTION_NAME, expertd_batch=batch)
        return logits[0, : len(token_ids)].float()  # type: ignore[no-any-return]  # nn.Module's call


class _LastLayer(AttentionBatch):
    """Attention over the last layer of a storage, whatever number the module has."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return super().attend(len(self.storage.keys) - 1, query, key, value, scale, window, sinks)


class NativeRouter(NativeModel):
    """The router as one native decoder layer between an input projection and a head."""

    def __init__(self, loaded: LoadedModel, max_positions: int) -> None:
        """Raises NotMatched, and KernelsMissing for kernels of another version."""
        if loaded.pool is None:
            raise NotMatched("there are no native kernels")
        module: Any = loaded.pregating
        table, first = match_matrix(loaded.model.get_input_embeddings())
        self._entry, ones = _norm(torch.ones(table.cols))
        self._in_proj, entry = match_matrix(module.in_proj)
        head_norm, middle = _norm(module.head_norm)
        head, last = match_matrix(module.head)
        layer = NativeLayer(*_block(module, max_positions))
        ends = Ends(table, 1.0, head_norm, head, 1.0, [*first, *ones, *entry, *middle, *last])
        super().__init__(loaded.pool, [layer], ends, last_of_storage=True)
        self._embeddings = torch.empty(1, table.cols)
        self._all_threads, self._one_thread = loaded.pool, Pool(loaded.pool.library, 1)

    def route_logits(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> Tensor:
        self.pool = self._one_thread if len(token_ids) <= _FEW else self._all_threads
        memory = self.begin(token_ids, positions, spans, storage)
        self.run_layer(0, memory)
        self.finish(0, memory)
        self.keep(memory)
        return self.logits(memory, range(len(token_ids)))

    def look_up(self, token_ids: Sequence[int], memory: StepMemory) -> None:
        """The projection of the normed embeddings, in the place of the embeddings."""
        count = len(token_ids)
        embeddings = (
            self._embeddings if count == len(self._embeddings) else torch.empty(count, self.ends.embedding.cols)
        )
        if count <= _FEW:  # a decode is like the one before it
            self._embeddings = embeddings
        ids, rows = array("q", token_ids), array("q", range(count))
        self.pool.library.rows(self.ends.embedding, ids.buffer_info()[0], count, embeddings.data_ptr())
        hidden = memory.activations.hidden
        self.calls.logits(
            *(self.pool.address, byref(self._entry), byref(self._in_proj), 1.0, embeddings.data_ptr(), count),
            *(rows.buffer_info()[0], count, hidden.data_ptr()),
        )


def _judged(native: NativeRouter, module: RouterLogits, kv_shape: LayerShape, loaded: LoadedModel) -> NativeRouter:
    """`native`, if it gives the module's logits on a probe but for rounding. Raises NotMatched."""
    token_ids = [(7919 * i + 13) % loaded.vocab_size for i in range(_JUDGED)]
    spans = [Span(0, 0, _JUDGED, list(range(1, 4)))]
    logits = [
        router.route_logits(token_ids, range(_JUDGED), spans, KVStorage([kv_shape], 4, 16, loaded.dtype))
        for router in (native, module)
    ]
    error = float((logits[0] - logits[1]).norm() / logits[1].norm())
    if not error <= _TOLERANCES[loaded.dtype]:
        raise NotMatched(f"the router differs from its module by {error:.2g}; allowed is {_TOLERANCES[loaded.dtype]}")
    return native


def _block(module: Any, max_positions: int) -> tuple[Block, None, None, list[Tensor]]:
    """What `NativeLayer` takes."""
    attention = module.attention
    block = Block()
    block.input_norm, norms = _norm(module.attention_norm)
    block.ffn_norm, more = _norm(module.mlp_norm)
    parts = [_slice(attention.qkv_proj, index, 3) for index in range(3)]
    (block.query, q), (block.key, k), (block.value, v) = parts
    block.output, o = match_matrix(attention.o_proj)
    up, u = match_matrix(module.up_proj)
    down, d = match_matrix(module.down_proj)
    block.ffn = FeedForward(Matrix(), up, down, ACTIVATIONS["silu"])
    cos, sin = angles(torch.arange(max_positions), attention.head_dim // 2)
    keep = [*norms, *more, *q, *k, *v, *o, *u, *d, cos, sin]
    block.cos, block.sin, block.positions = cos.data_ptr(), sin.data_ptr(), max_positions
    block.rope, block.rotary_dim = Rope.HALVES, attention.head_dim
    block.hidden, block.heads, block.kv_heads = module.shape.width, attention.heads, attention.heads
    block.key_dim = block.value_dim = attention.head_dim
    block.scale, block.attention_residual, block.ffn_residual = attention.scaling, 1.0, 1.0
    return block, None, None, keep


def _slice(module: Any, index: int, count: int) -> tuple[Matrix, list[Tensor]]:
    """The `index`-th of `count` equal parts of a linear layer's outputs."""
    if type(module) is not torch.nn.Linear:
        raise NotMatched(f"{type(module).__name__} is no linear layer that can be cut")
    part = torch.nn.Linear(1, 1, bias=False, device="meta")
    part.weight = torch.nn.Parameter(module.weight.chunk(count)[index], requires_grad=False)
    return match_matrix(part)


def _norm(weight: Tensor) -> tuple[Norm, list[Tensor]]:
    own = weight.detach().float().contiguous()
    return Norm(own.data_ptr(), None, NormKind.RMS, len(own), _EPS), [own]


def _padded(values: Sequence[int]) -> Tensor:
    return torch.tensor([*values, *[0] * (-len(values) % ROW_MULTIPLE)], dtype=torch.long)
