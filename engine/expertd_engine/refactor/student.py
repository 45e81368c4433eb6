"""The model in training: a dense backbone whose FFNs became parts, with its router. Owns all trained weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from expertd_engine.refactor.dense import Dense, ffn_stack
from expertd_engine.refactor.feed_forward import RoutedFeedForward, choose, dispatch
from expertd_engine.refactor.parts import FullPart, LowRankLinear, LowRankPart
from expertd_engine.refactor.router import PregatingRouter, RouterShape
from expertd_engine.refactor.selection import Selection
from expertd_engine.refactor.shape import Routing, Shape

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Student(nn.Module):
    """`shape` None keeps the dense FFNs (for tuning the dense model itself)."""

    def __init__(self, dense: Dense, shape: Shape | None, selection: Selection | None, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.selection = selection
        # Not the model's own `float`, which refuses what came out of a GGUF file, though its weights are plain by now.
        self.backbone: Any = nn.Module.float(copy.deepcopy(dense.model))
        self.router: PregatingRouter | None = None
        self.compute_dtype = torch.float32
        self.blocks: list[RoutedFeedForward] = []
        if shape is None or selection is None:
            return
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        for layer, module in enumerate(_layers(self.backbone, dense)):
            block = _block(module.mlp, shape, selection, layer, generator)
            module.mlp = block.to(dense.device)
            self.blocks.append(block)
        if shape.rank is not None:
            self._freeze_but_deltas(dense, shape.attention_rank, generator)
        if shape.routing.pregated:
            count = len(self.blocks) if shape.routing == Routing.HEADS else 1
            router = RouterShape.beside(dense.hidden_size, count * shape.experts)
            self.router = PregatingRouter(router, len(self.blocks)).to(dense.device)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Where activations are kept and matrix products run; weights stay float32."""
        self.compute_dtype = dtype
        for block in self.blocks:
            block.compute_dtype = dtype

    def freeze(self, dtype: torch.dtype) -> None:
        """Only to be asked from now on, as a teacher: weights in `dtype`, no gradients."""
        self.requires_grad_(False)
        self.backbone.to(dtype)
        self.compute_in(dtype)

    def compile(self, *_: Any, **__: Any) -> None:
        """Compile the decoder layers; they are alike, so that one compilation does for all."""
        for layer in self.backbone.base_model.layers:
            layer.compile()

    def hidden(self, ids: Tensor, forced: Tensor | None = None) -> Tensor:
        """Last hidden states `[B, T, H]` of `ids` `[B, T]`; `forced` `[B, T]` are indices in the router's place."""
        embeddings = self.backbone.get_input_embeddings()(ids)
        if self.router is not None:
            self._set_routes(self.route_logits(ids) if forced is None else None, forced)
        out = self.backbone.base_model(inputs_embeds=embeddings.to(self.compute_dtype), use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def route_logits(self, ids: Tensor) -> Tensor:
        """`[B, T, outputs]`. The embedding is shared and learns nothing from the router."""
        assert self.router is not None
        embeddings = self.backbone.get_input_embeddings()(ids).detach()
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        logits: Tensor = self.router(embeddings, positions)
        return logits

    @property
    def head(self) -> Tensor:
        weight: Tensor = self.backbone.get_output_embeddings().weight
        return weight

    @property
    def softcap(self) -> float | None:
        return getattr(self.backbone.config, "final_logit_softcapping", None)

    def logits(self, ids: Tensor, forced: Tensor | None = None) -> Tensor:
        """`[B, T, vocabulary]`."""
        return capped(self.hidden(ids, forced) @ self.head.to(self.compute_dtype).T, self.softcap)

    def imbalance(self) -> Tensor:
        """Mean over the layers that route for themselves, of the last forward pass; 0 where none does."""
        found = [block.imbalance for block in self.blocks if block.gate is not None]
        return torch.stack(found).mean() if found else self.head.new_zeros(())

    def router_parameters(self) -> list[nn.Parameter]:
        """Of the pre-gating router, or of the layers' own gates."""
        if self.router is not None:
            return list(self.router.parameters())
        return [one for block in self.blocks if block.gate is not None for one in block.gate.parameters()]

    def expert_parameters(self) -> list[nn.Parameter]:
        """All else that is trained; layers' own gates too, which the language loss reaches."""
        pregated = set() if self.router is None else set(map(id, self.router.parameters()))
        return [one for one in self.parameters() if one.requires_grad and id(one) not in pregated]

    def trained(self) -> dict[str, Tensor]:
        """Name → tensor of everything that training changes."""
        return {name: one.detach() for name, one in self.named_parameters() if one.requires_grad}

    def load_trained(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `trained` gave. Raises KeyError for tensors of another shape of model."""
        own = dict(self.named_parameters())
        for name, tensor in tensors.items():
            own[name].data.copy_(tensor)

    def _freeze_but_deltas(self, dense: Dense, rank: int, generator: torch.Generator) -> None:
        kept = {id(one) for block in self.blocks for one in block.parameters()}
        for name, parameter in self.backbone.named_parameters():
            if id(parameter) not in kept and "norm" not in name:
                parameter.requires_grad_(False)
        for layer in _layers(self.backbone, dense):
            for name in _PROJECTIONS:
                setattr(layer.self_attn, name, LowRankLinear(getattr(layer.self_attn, name), rank, generator))

    def _set_routes(self, logits: Tensor | None, forced: Tensor | None) -> None:
        assert self.shape is not None
        if self.shape.routing == Routing.INDEX:
            index = forced if logits is None else logits.argmax(dim=-1)
            assert index is not None
            route = dispatch(index.reshape(-1, 1), self.shape.experts)
            for block in self.blocks:
                block.route = route
            return
        assert logits is not None, "indices are forced on single-index models alone"
        each = logits.reshape(-1, len(self.blocks), self.shape.experts)
        for layer, block in enumerate(self.blocks):
            index, weights = choose(each[:, layer], self.shape.top_k)
            block.route = dispatch(index, self.shape.experts, weights)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def _layers(backbone: Any, dense: Dense) -> Iterator[Any]:
    """The copy's decoder layers, in the order of the original's."""
    places = {id(module): name for name, module in dense.model.named_modules()}
    return (backbone.get_submodule(places[id(layer)]) for layer in dense.layers)


def _block(mlp: Any, shape: Shape, selection: Selection, layer: int, generator: torch.Generator) -> RoutedFeedForward:
    stack = ffn_stack(mlp)
    permanent = selection.permanent[layer].to(stack.device)
    kept = _part(stack[:, permanent][:, None], shape, generator) if shape.permanent else None
    experts = None
    if shape.experts:
        taken = stack[:, selection.experts[layer].to(stack.device)]
        further = stack[:, selection.fresh[layer].to(stack.device)]
        further[2] = 0  # no effect yet
        weights = torch.cat([taken, further], dim=2)
        if shape.weighted:
            weights[2] *= shape.top_k
        experts = _part(weights, shape, generator)
    return RoutedFeedForward(shape, kept, experts, mlp.act_fn, stack.shape[-1])


def _part(weights: Tensor, shape: Shape, generator: torch.Generator) -> FullPart | LowRankPart:
    if shape.rank is None:
        return FullPart(weights)
    return LowRankPart(weights, shape.rank, shared_basis=shape.shared_basis, generator=generator)


def expert_masks(selection: Selection, neurons: int) -> Tensor:
    """`[layers, neurons, E]` float32: 1 where a neuron belongs to an expert."""
    return one_hot(selection.experts, neurons).sum(dim=2).float().transpose(1, 2)
