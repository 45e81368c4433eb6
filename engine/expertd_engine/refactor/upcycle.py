"""Experts that begin as copies of a trained pruned model's FFNs (sparse upcycling). Holds no state."""

from __future__ import annotations

from torch import Tensor

from expertd_engine.errors import ModelError
from expertd_engine.refactor.dense import Dense
from expertd_engine.refactor.parts import FullPart
from expertd_engine.refactor.selection import Selection, mean_shares
from expertd_engine.refactor.shape import Routing, Shape
from expertd_engine.refactor.statistics import Statistics
from expertd_engine.refactor.student import Student


def upcycled(pruned: Student, shape: Shape, dense: Dense, statistics: Statistics, seed: int = 0) -> Student:
    """The model of `shape` that computes what `pruned` does, whatever its router says, but for neurons that `shape`
    has no room for: in each layer those with most energy in the dense model are permanent, the next are in every
    expert, and those with least go. (Weights' norms tell less: neurons that few strong inputs need have small ones.)

    Raises ModelError for a shape that is no single index with full weights, or has more active neurons than `pruned`.
    """
    if shape.routing != Routing.INDEX or shape.rank is not None or shape.from_dense != shape.width:
        raise ModelError("only experts of one index with full weights, all of them out of the dense model, can be "
                         f"copies of a pruned FFN: asked for {shape}")  # fmt: skip
    stacks = [_trained_stack(pruned, layer) for layer in range(len(pruned.blocks))]
    if shape.active > stacks[0].shape[1]:
        raise ModelError(f"{shape.active} active neurons cannot be copies of a pruned FFN's {stacks[0].shape[1]}")
    assert pruned.selection is not None
    numbers = pruned.selection.permanent.cpu()
    orders = mean_shares(statistics.energy).gather(1, numbers).argsort(dim=1, descending=True, stable=True)
    student = Student(dense, shape, _selection(numbers.gather(1, orders), shape), seed)
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


def _selection(numbers: Tensor, shape: Shape) -> Selection:
    """Where the copies' neurons stood in the dense model: `numbers` `[layers, N]`, those with most energy first."""
    permanent, copied = numbers[:, : shape.permanent], numbers[:, shape.permanent : shape.active]
    experts = copied[:, None].expand(-1, shape.experts, -1).contiguous()
    return Selection(permanent.contiguous(), experts, experts[:, :, :0])
