"""The pre-gating router as one native call: token ids to experts. Owns its descriptors, and the thread that runs it
beside the caller.

Inside, the router is a decoder layer between an input projection and a head, so a token's route has the same bits in
every batch and for every cut.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import POINTER, addressof, byref, c_int32, c_int64, c_void_p
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from expertd_engine.kernels.library import ACTIVATIONS, FORMATS, KernelsMissing, Library, Matrix
from expertd_engine.model.kv_storage import KVStorage
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.native_abi import Block, FeedForward, Norm, NormKind, Rope, Router, Scores, Step
from expertd_engine.model.native_match import match_matrix
from expertd_engine.model.native_witness import NotMatched
from expertd_engine.model.step_rows import Span
from expertd_engine.paths import PathShape, Routes
from expertd_engine.refactor.router import angles

_EPS = 1e-6
_KV_FORMATS = {torch.float32: FORMATS["float32"], torch.bfloat16: FORMATS["bfloat16"]}


class _Pregate(ctypes.Structure):
    """`expertd_pregate` of `kernels/native/expertd_pregate.h`."""

    _fields_ = [
        ("embedding", Matrix),
        ("entry_norm", Norm),
        ("entry", Matrix),
        ("block", Block),
        ("head_norm", Norm),
        ("head", Matrix),
        ("router", Router),
        ("heads", c_int32),
    ]


class NativeRouter:
    """One model's router, in its kernels."""

    def __init__(self, loaded: LoadedModel, shape: PathShape, max_positions: int) -> None:
        """Raises NotMatched, and KernelsMissing for kernels of another version."""
        if loaded.pool is None:
            raise NotMatched("there are no native kernels")
        self._forward = _bind(loaded.pool.library)
        self._pool = loaded.pool
        self.aside = _Aside(loaded.pool.library)
        self.stride, self.outputs = shape.stride, shape.heads * int(loaded.model.config.num_experts)
        module: Any = loaded.pregating
        self.pregate = _Pregate()
        self._keep = _fill(self.pregate, module, loaded.model.get_input_embeddings(), shape, max_positions)

    def route(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        spans: Sequence[Span],
        storage: KVStorage,
    ) -> Routes:
        """As `Routing.route`. Raises KernelError, and ValueError for a token that the model does not have."""
        call = self._call(token_ids, positions, spans, storage)
        self._forward(self._pool.address, *call.arguments)
        return call.routes

    def begin(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], storage: KVStorage
    ) -> _Call:
        """As `Routing.begin`: on a thread of its own."""
        call = self._call(token_ids, positions, spans, storage)
        self.aside.begin(call)
        return call

    def _call(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        spans: Sequence[Span],
        storage: KVStorage,
    ) -> _Call:
        count = len(token_ids)
        starts = accumulate((len(span.blocks) for span in spans), initial=0)
        numbers = array("q", [*token_ids, *positions, *(span.row for span in spans), count, *starts])
        tables = array("i", chain.from_iterable(span.blocks for span in spans))
        ids = _at(numbers)
        rows = ids + 16 * count
        step = Step(
            *(count, ids + 8 * count, len(spans), rows, rows + 8 * len(spans) + 8, _at(tables), storage.address),
            *(storage.block_bytes, storage.block_tokens, _KV_FORMATS[storage.dtype]),
        )
        call = _Call(self, count, numbers, tables, step, storage)
        call.point()
        return call


class _Call:
    """A native call, and all that it points to."""

    def __init__(
        self, router: NativeRouter, count: int, numbers: array[int], tables: array[int], step: Step, storage: KVStorage
    ) -> None:
        """`numbers` are `count` token ids, as many positions, and what else `step` points to; `tables` likewise."""
        self.routes = Routes.blank(count, router.stride, router.outputs)
        step.logits = _at(self.routes.logits)
        self._router, self._count, self._numbers = router, count, numbers
        self._keep = tables, step, storage
        self._block, self._offsets = router.pregate.block, storage.offsets[-1]
        self.arguments = (
            *(byref(router.pregate), _at(numbers), addressof(step), _at(self.routes.experts), _at(self.routes.weights)),
        )

    def point(self) -> None:
        """The router is one for all calls; where keys and values lie is the call's."""
        self._block.key_offset, self._block.value_offset = self._offsets

    def finish(self) -> Routes:
        """As `Begun.finish`."""
        self._router.aside.end()
        return self.routes

    def again(self, token_ids: Sequence[int]) -> None:
        """As `Begun.again`."""
        for row, token in enumerate(token_ids):
            self._numbers[row] = token
            self._numbers[self._count + row] += 1
        self.point()
        self._router.aside.begin(self)


class _Aside:
    """The native thread. Keeps the call that it makes, so that one nobody waits for ends in memory of its own."""

    def __init__(self, library: Library) -> None:
        create = library.bind("expertd_pregate_thread_create", [c_void_p])
        self._begin = library.bind("expertd_pregate_begin", [c_void_p, POINTER(_Pregate), *[c_void_p] * 4])
        self._end = library.bind("expertd_pregate_end", [c_void_p])
        self._destroy = library.bind("expertd_pregate_thread_destroy", [c_void_p])
        self._call: _Call | None = None
        self._thread = c_void_p()
        create(byref(self._thread))

    def begin(self, call: _Call) -> None:
        self._begin(self._thread, *call.arguments)
        self._call = call

    def end(self) -> None:
        """Raises what the call raised."""
        self._end(self._thread)
        self._call = None

    def __del__(self) -> None:
        self._destroy(self._thread)


def _at(values: array[Any]) -> int:
    return values.buffer_info()[0]


def _bind(library: Library) -> Any:
    size: Any = getattr(library.handle, "expertd_pregate_bytes", lambda: None)  # absent from older libraries
    size.restype = c_int64
    if size() != ctypes.sizeof(_Pregate) or not hasattr(library.handle, "expertd_pregate_begin"):
        raise KernelsMissing(f"native kernels {library.path} are of another version: install again")
    return library.bind(
        "expertd_pregate_forward", [c_void_p, POINTER(_Pregate), c_void_p, c_void_p, c_void_p, c_void_p]
    )


def _fill(pregate: _Pregate, module: Any, embedding: Any, shape: PathShape, max_positions: int) -> list[Tensor]:
    """Describe `module`; what the description points to is returned."""
    pregate.embedding, keep = match_matrix(embedding)
    pregate.entry, entry = match_matrix(module.in_proj)
    pregate.entry_norm, ones = _norm(torch.ones(pregate.embedding.cols))
    pregate.head, head = match_matrix(module.head)
    pregate.head_norm, norm = _norm(module.head_norm)
    pregate.heads = shape.heads
    router = pregate.router
    router.experts, router.top_k = pregate.head.rows // shape.heads, shape.top_k
    router.scores, router.shares, router.scale = Scores.SOFTMAX, 1, 1.0
    return [*keep, *entry, *ones, *head, *norm, *_fill_block(pregate.block, module, max_positions)]


def _fill_block(block: Block, module: Any, max_positions: int) -> list[Tensor]:
    attention = module.attention
    block.input_norm, norms = _norm(module.attention_norm)
    block.ffn_norm, more = _norm(module.mlp_norm)
    parts = [_slice(attention.qkv_proj, index, 3) for index in range(3)]
    (block.query, q), (block.key, k), (block.value, v) = parts
    block.output, o = match_matrix(attention.o_proj)
    up, u = match_matrix(module.up_proj)
    down, d = match_matrix(module.down_proj)
    block.ffn = FeedForward(Matrix(), up, down, ACTIVATIONS["silu"])
    cos, sin = angles(torch.arange(max_positions), attention.head_dim // 2)
    block.cos, block.sin, block.positions = cos.data_ptr(), sin.data_ptr(), max_positions
    block.rope, block.rotary_dim = Rope.HALVES, attention.head_dim
    block.hidden, block.heads, block.kv_heads = module.shape.width, attention.heads, attention.heads
    block.key_dim = block.value_dim = attention.head_dim
    block.scale, block.attention_residual, block.ffn_residual = attention.scaling, 1.0, 1.0
    return [*norms, *more, *q, *k, *v, *o, *u, *d, cos, sin]


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
