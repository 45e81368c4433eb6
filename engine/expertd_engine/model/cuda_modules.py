"""The dense side of a model as transformers' modules on the device, for families that the kernels' program is not.

Attention, keys and values, and the routed experts are computed by our kernels as ever; all between them is launched
operation by operation, in no graph. Slower, with the same contract: whoever calls `run_layers` waits for nothing.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from expertd_engine.kernels.cuda.attention import AttentionScratch, attend
from expertd_engine.kernels.cuda.block import Argmax, HeadLayout, store_qkv
from expertd_engine.kernels.cuda.dense import embed, matmul
from expertd_engine.kernels.cuda.matrices import DeviceMatrix
from expertd_engine.model.cuda_inputs import StepInputs
from expertd_engine.model.cuda_kv import DeviceKV
from expertd_engine.model.cuda_program import Experts, ProgramRoom
from expertd_engine.model.cuda_virtual import VirtualWork
from expertd_engine.model.dense import Matrix, QuantisedEmbedding, QuantisedLinear
from expertd_engine.model.loader import LoadedModel
from expertd_engine.model.native_abi import Rope
from expertd_engine.model.numerics import InvariantActivation, InvariantSigmoids


class DeviceMatrices:
    """`dense.MatrixKernels` on the device: quantised matrices are multiplied as the kernels' program has it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[int, DeviceMatrix] = {}

    def hold(self, matrix: Matrix) -> DeviceMatrix:
        """Carry a matrix over, once however many modules share it."""
        address = matrix.data.data_ptr()
        if address not in self._made:
            made = DeviceMatrix.of(matrix.format, matrix.data, matrix.rows, matrix.cols, None, self._device)
            self._made[address] = made
        return self._made[address]

    def matmul(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.empty(len(x), matrix.rows, device=x.device)
        matmul(x.contiguous(), self.hold(matrix), out)
        return out if bias is None else out.add_(bias)

    def rows(self, matrix: Matrix, ids: Tensor) -> Tensor:
        out = torch.empty(len(ids), matrix.cols, device=ids.device)
        embed(self.hold(matrix), ids, 1.0, out)
        return out


class _Body(nn.Module):
    """All of a model but its head; where `given` is set, that is what it gives: so that the head, with whatever the
    family does to logits, runs on chosen rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.given: Tensor | None = None

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs) if self.given is None else MoeModelOutputWithPast(last_hidden_state=self.given)


class _ModuleExperts:
    """One MoE layer's experts; hangs on the experts module as `expertd_layer`, in the place of a `moe.MoELayer`."""

    def __init__(self, moe: int, dtype: torch.dtype) -> None:
        self.experts: Experts | None = None
        """Of the running step."""
        self._moe, self._dtype = moe, dtype

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        assert self.experts is not None, "an experts module ran outside a step"
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        index, weights = top_k_index.to(torch.int32).contiguous(), top_k_weights.float().contiguous()
        self.experts.add(self._moe, hidden.to(self._dtype).contiguous(), index, weights, out)
        return out.to(hidden.dtype)


class _Attend:
    """`attention.Attend` of one step on the device."""

    def __init__(
        self, kv: DeviceKV, inputs: StepInputs, scratch: AttentionScratch, rows: int, tiles: Tensor | None
    ) -> None:
        self._kv, self._scratch, self._tiles = kv, scratch, tiles
        self._places = inputs.positions[:rows], inputs.row_table[:rows], inputs.tables

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rows, kv_heads, group, key_dim = query.shape
        value_dim = value.shape[-1]
        layout = HeadLayout(
            heads=kv_heads * group, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim, rope=Rope.NONE,
            rotary_dim=0, cos=None, sin=None, query_norm=None, key_norm=None, norm_after_rope=False, clip=0.0,
            scale=scale,
        )  # fmt: skip
        made = torch.cat([part.flatten(1).float() for part in (query, key, value)], dim=1)
        queries = torch.empty(rows, layout.heads * key_dim, device=query.device)
        out = torch.empty(rows, layout.heads * value_dim, device=query.device)
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        positions, row_table, tables = self._places
        store_qkv(made, layout, queries, keys, values, positions, row_table, tables)
        attend(
            queries, keys, values, tables, row_table, positions, out, self._scratch, window=window or 0,
            sinks=None if sinks is None else sinks.float().flatten(), tiles=self._tiles,
        )  # fmt: skip
        return out.view(rows, kv_heads, group, value_dim).to(query.dtype)


class DeviceModules:
    """A loaded model, moved to the device as it is."""

    is_graph = False
    """Modules may launch what no graph can hold."""
    no_virtual: str | None = "its routers are PyTorch's modules"

    def __init__(self, loaded: LoadedModel, device: torch.device, dtype: torch.dtype) -> None:
        """From here on the loaded model computes on `device` alone. `dtype`: of rows that expert kernels read."""
        matrices = DeviceMatrices(device)
        for module in loaded.model.modules():
            if isinstance(module, QuantisedLinear | QuantisedEmbedding):
                module.kernels = matrices
                matrices.hold(module.matrix)
            if isinstance(act := getattr(module, "act_fn", None), InvariantActivation):
                module.act_fn = act.act  # what makes bits equal on a processor
        self._loaded, self._model = loaded, loaded.model.to(device)
        name = loaded.model.base_model_prefix
        self._body = _Body(getattr(self._model, name))
        setattr(self._model, name, self._body)
        self._layers = [_ModuleExperts(moe, dtype) for moe in range(len(loaded.moe_modules))]
        for module, layer in zip(loaded.moe_modules, self._layers, strict=True):
            module.expertd_layer = layer  # type: ignore[assignment]  # a plain attribute, not a submodule
        self.vocabulary, self.device, self.dtype = loaded.vocab_size, device, loaded.dtype

    def program(self, room: ProgramRoom, *, invariant: bool) -> ModulesProgram:
        """See `cuda_program.DenseSide`."""
        return ModulesProgram(self, room, invariant=invariant)

    def run_body(self, ids: Tensor, positions: Tensor, experts: Experts, attention: _Attend) -> Tensor:
        """The residual stream behind the last layer `[R, H]` of tokens `ids` `[R]` at `positions` `[R]`."""
        for layer in self._layers:
            layer.experts = experts
        self._body.given = None
        with InvariantSigmoids() if self._loaded.float32_sigmoids else nullcontext():
            made = self._body(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, expertd_batch=attention
            )
        stream: Tensor = made.last_hidden_state[0]
        return stream

    def run_head(self, hidden: Tensor) -> Tensor:
        """Logits `[n, V]` of rows `hidden` `[n, H]`."""
        self._body.given = hidden[None]
        zeros = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        logits: Tensor = self._model(input_ids=zeros, use_cache=False).logits[0]
        return logits


class ModulesProgram:
    """`cuda_program.StepProgram` over modules, one KV pool and one set of inputs."""

    def __init__(self, modules: DeviceModules, room: ProgramRoom, *, invariant: bool) -> None:
        shapes, device = room.kv.shapes, modules.device
        self.logits = room.logits
        self.hidden = torch.zeros(room.rows, room.hidden, device=device)
        self._modules, self._kv, self._inputs, self._invariant = modules, room.kv, room.inputs, invariant
        self._scratch = AttentionScratch.of(
            room.alone, max(shape.kv_heads * shape.group for shape in shapes), max(shape.kv_heads for shape in shapes),
            max(shape.value_dim for shape in shapes), device,
        )  # fmt: skip
        self._dtype = modules.dtype
        self._argmax = Argmax(len(room.logits), room.logits.shape[1], device)

    def run_layers(
        self, rows: int, experts: Experts, tiles: Tensor | None = None, virtual: VirtualWork | None = None
    ) -> None:
        """See `cuda_program.StepProgram`."""
        assert virtual is None
        attention = _Attend(self._kv, self._inputs, self._scratch, rows, None if self._invariant else tiles)
        ids, positions = self._inputs.ids[:rows].long(), self._inputs.positions[:rows].clamp(min=0).long()
        self.hidden[:rows].copy_(self._modules.run_body(ids, positions, experts, attention))

    def run_head(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `cuda_program.StepProgram`."""
        logits = self.logits[: len(hidden)]
        logits.copy_(self._modules.run_head(hidden.to(self._dtype)))
        self._argmax(logits, tokens[: len(hidden)])
        return logits
