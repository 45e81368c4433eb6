"""Experts that begin as copies of a trained pruned model's FFNs (sparse upcycling). Holds no state."""

from __future__ import annotations

import torch
from torch import Tensor

from expertd_engine.errors import ModelError
from expertd_engine.refactor.dense import Dense
from expertd_engine.refactor.parts import FullPart
from expertd_engine.refactor.selection import Selection
from expertd_engine.refactor.shape import Routing, Shape
from expertd_engine.refactor.student import Student


def upcycled(pruned: Student, shape: Shape, dense: Dense, seed: int = 0) -> Student:
    """The model of `shape` that computes what `pruned` does, whatever its router says, but for neurons that `shape`
    has no room for: in each layer the strongest are permanent, the next are in every expert, the weakest go.

    Raises ModelError for a shape that is no single index with full weights, or has more active neurons than `pruned`.
    """
    if shape.routing != Routing.INDEX or shape.rank is not None or shape.from_dense != shape.width:
        raise ModelError("only experts of one index with full weights, all of them out of the dense model, can be "
                         f"copies of a pruned FFN: asked for {shape}")  # fmt: skip
    stacks = [_trained_stack(pruned, layer) for layer in range(len(pruned.blocks))]
    if shape.active > stacks[0].shape[1]:
        raise ModelError(f"{shape.active} active neurons cannot be copies of a pruned FFN's {stacks[0].shape[1]}")
    orders = [_strongest(stack) for stack in stacks]
    student = Student(dense, shape, _selection(pruned, orders, shape), seed)
    student.load_trained({name: one for name, one in pruned.trained().items() if ".mlp." not in name})
    for block, stack, order in zip(student.blocks, stacks, orders, strict=True):
        permanent, copied = order[: shape.permanent], order[shape.permanent : shape.active]
        if isinstance(block.permanent, FullPart):
            block.permanent.weight.data.copy_(stack[:, None, permanent])
        if isinstance(block.experts, FullPart):
            block.experts.weight.data.copy_(stack[:, None, copied].expand_as(block.experts.weight))
    return student


def _trained_stack(pruned: Student, layer: int) -> Tensor:
    """`[3, N, H]` of a layer's permanent part. Raises ModelError where there are experts already."""
    block = pruned.blocks[layer]
    if block.experts is not None or not isinstance(block.permanent, FullPart):
        raise ModelError("experts can begin as copies of a pruned model with full weights alone")
    stack: Tensor = block.permanent.weight.detach()[:, 0]
    return stack


def _strongest(stack: Tensor) -> Tensor:
    """Neuron places by the product of the norms of their three vectors, the largest first."""
    strength: Tensor = stack.norm(dim=-1).log().sum(dim=0)
    return strength.argsort(descending=True, stable=True)


def _selection(pruned: Student, orders: list[Tensor], shape: Shape) -> Selection:
    """Where the copies' neurons stood in the dense model."""
    assert pruned.selection is not None
    numbers = torch.stack(
        [kept[order.cpu()] for kept, order in zip(pruned.selection.permanent.cpu(), orders, strict=True)]
    )
    permanent, copied = numbers[:, : shape.permanent], numbers[:, shape.permanent : shape.active]
    experts = copied[:, None].expand(-1, shape.experts, -1).contiguous()
    return Selection(permanent.contiguous(), experts, experts[:, :, :0])
