"""A model's description on the device: what the CPU's native path found out, with every address become a device tensor.

The CPU's path settles by numbers how a model computes (`native_build`); nothing is found out anew here. Descriptors of
`native_abi` hold addresses, and `keep` the tensors behind them: each is looked up by its address and carried over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd_engine.kernels import library
from expertd_engine.kernels.cuda.block import HeadLayout
from expertd_engine.kernels.cuda.matrices import DeviceMatrix
from expertd_engine.kernels.cuda.norms import DeviceNorm
from expertd_engine.kernels.cuda.router import RouterLayout
from expertd_engine.kernels.library import ACTIVATIONS, FORMATS
from expertd_engine.model.native_abi import Block, FeedForward, Norm, NormKind, Rope, Router, Scores
from expertd_engine.model.native_model import Ends
from expertd_engine.model.native_step import NativeLayer
from expertd_engine.model.native_witness import NotMatched
from expertd_engine.model.router_kinds import RouterAdapter
from expertd_engine.model.router_rules import Rule

_FORMAT_NAMES = {number: name for name, number in FORMATS.items()}
_ACTIVATION_NAMES = {number: name for name, number in ACTIVATIONS.items()}


@dataclass(frozen=True, slots=True, eq=False)
class DeviceFeedForward:
    """down(act(gate x) * up x); gate and up are one matrix, gate's rows first. Without a gate: down(act(up x))."""

    gate_up: DeviceMatrix
    down: DeviceMatrix
    gated: bool
    activation: str
    alpha: float
    limit: float


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRouter:
    """Who chooses a layer's experts."""

    matrix: DeviceMatrix
    """`[experts, hidden]`."""
    top_k: int
    rule: RouterLayout | None
    """How a kernel selects; None where no kernel knows the rule."""
    select: Rule | None
    """That rule as torch operations on the logits; None where `rule` is there."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceLayer:
    """One decoder layer; `native_abi.Block` says what each part does."""

    moe: int | None
    """Which MoE layer it is; None: dense."""
    input_norm: DeviceNorm | None
    attention_norm: DeviceNorm | None
    ffn_norm: DeviceNorm | None
    output_norm: DeviceNorm | None
    projections: DeviceMatrix
    """Queries, keys, values, and the attention gate where there is one: rows one after the other."""
    gate_width: int
    """Rows of the attention gate; 0: none."""
    output: DeviceMatrix
    heads: HeadLayout
    sinks: Tensor | None
    window: int
    router: DeviceRouter | None
    ffn: DeviceFeedForward | None
    """A dense layer's own, or what is shared by all tokens."""
    ffn_gate: DeviceMatrix | None
    parallel: bool
    attention_residual: float
    ffn_residual: float


@dataclass(frozen=True, slots=True, eq=False)
class DeviceEnds:
    """What stands before the first layer and after the last."""

    embedding: DeviceMatrix
    embedding_scale: float
    norm: DeviceNorm | None
    head: DeviceMatrix
    logit_scale: float


class Carrier:
    """Carries matrices and vectors over, each tensor once, however many descriptors point to it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: dict[int, Tensor] = {}
        self._vectors: dict[int, Tensor] = {}
        self._matrices: dict[int, DeviceMatrix] = {}

    def ends(self, ends: Ends) -> DeviceEnds:
        self._learn(ends.keep)
        norm = self._norm(ends.norm)
        head = self._matrix(ends.head)
        return DeviceEnds(self._matrix(ends.embedding), ends.embedding_scale, norm, head, ends.logit_scale)

    def layer(self, layer: NativeLayer) -> DeviceLayer:
        """Raises NotMatched for what only the CPU's path computes."""
        self._learn(layer.keep)
        block = layer.block
        sinks = None if block.sinks is None else self._vector(block.sinks, block.heads)
        return DeviceLayer(
            moe=layer.moe,
            **{name: self._norm(getattr(block, name)) for name in _LAYER_NORMS},
            projections=self._projections(block),
            gate_width=block.attention_gate.rows if block.attention_gate.data else 0,
            output=self._matrix(block.output),
            heads=self._heads(block),
            sinks=sinks,
            window=int(block.window),
            router=None if layer.moe is None else self._router(block.router, layer.router),
            ffn=self._feed_forward(block.ffn) if block.ffn.up.data else None,
            ffn_gate=self._matrix(block.ffn_gate) if block.ffn_gate.data else None,
            parallel=bool(block.parallel),
            attention_residual=block.attention_residual,
            ffn_residual=block.ffn_residual,
        )

    def _learn(self, keep: Iterable[Tensor]) -> None:
        self._host.update((tensor.data_ptr(), tensor) for tensor in keep)

    def _vector(self, address: int, length: int) -> Tensor:
        """float32 `[length]` that lies at `address`."""
        if address not in self._vectors:
            self._vectors[address] = self._host[address].detach().float().to(self._device).contiguous()
        return self._vectors[address].view(-1)[:length]

    def _norm(self, norm: Norm) -> DeviceNorm | None:
        if norm.kind == NormKind.NONE:
            return None
        bias = None if norm.bias is None else self._vector(norm.bias, norm.length)
        return DeviceNorm(NormKind(norm.kind), self._vector(norm.weight, norm.length), bias, norm.eps, norm.length)

    def _matrix(self, matrix: library.Matrix) -> DeviceMatrix:
        if matrix.data not in self._matrices:
            bias = None if matrix.bias is None else self._host[matrix.bias]
            data = self._host[matrix.data].detach()
            made = DeviceMatrix.of(_FORMAT_NAMES[matrix.format], data, matrix.rows, matrix.cols, bias, self._device)
            self._matrices[matrix.data] = made
        return self._matrices[matrix.data]

    def _joined(self, parts: Sequence[library.Matrix]) -> DeviceMatrix:
        """Their rows as one matrix. Raises NotMatched where they are of different kinds."""
        try:
            joined = DeviceMatrix.concat([self._matrix(part) for part in parts])
        except ValueError as error:
            raise NotMatched(str(error)) from None
        for part in parts:
            del self._matrices[part.data]  # nobody else reads it
        return joined

    def _projections(self, block: Block) -> DeviceMatrix:
        gate = [block.attention_gate] if block.attention_gate.data else []
        return self._joined([block.query, block.key, block.value, *gate])

    def _heads(self, block: Block) -> HeadLayout:
        half = block.rotary_dim // 2
        rotates = block.rope != Rope.NONE
        angles = [self._angles(one, block.positions, half) if rotates else None for one in (block.cos, block.sin)]
        return HeadLayout(
            heads=block.heads,
            kv_heads=block.kv_heads,
            key_dim=block.key_dim,
            value_dim=block.value_dim,
            rope=Rope(block.rope),
            rotary_dim=block.rotary_dim if rotates else 0,
            norm_after_rope=bool(block.norm_after_rope),
            clip=block.clip,
            scale=block.scale,
            query_norm=self._norm(block.query_norm),
            key_norm=self._norm(block.key_norm),
            cos=angles[0],
            sin=angles[1],
        )

    def _angles(self, address: int, positions: int, half: int) -> Tensor:
        return self._vector(address, positions * half).view(positions, half)

    def _router(self, router: Router, adapter: RouterAdapter | None) -> DeviceRouter:
        matrix = self._matrix(router.matrix)
        if adapter is not None:
            return DeviceRouter(matrix, router.top_k, None, adapter.rule_on(self._device))
        rule = RouterLayout(
            matrix=matrix,
            bias=None if router.bias is None else self._vector(router.bias, router.experts),
            top_k=router.top_k,
            scores=Scores(router.scores),
            groups=router.groups,
            groups_kept=router.groups_kept,
            group_best=router.group_best,
            shares=bool(router.shares),
            epsilon=router.epsilon,
            scale=router.scale,
        )
        return DeviceRouter(matrix, router.top_k, rule, None)

    def _feed_forward(self, ffn: FeedForward) -> DeviceFeedForward:
        gated = bool(ffn.gate.data)
        return DeviceFeedForward(
            gate_up=self._joined([ffn.gate, ffn.up]) if gated else self._matrix(ffn.up),
            down=self._matrix(ffn.down),
            gated=gated,
            activation=_ACTIVATION_NAMES[ffn.activation],
            alpha=ffn.alpha,
            limit=ffn.limit,
        )


_LAYER_NORMS = ("input_norm", "attention_norm", "ffn_norm", "output_norm")
