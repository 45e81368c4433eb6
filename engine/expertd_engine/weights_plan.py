"""How a model's weights will lie in a store: which tensors, in which form, at which offset. Pure arithmetic on shapes.

Experts become records with the same tensors for every family (`experts.store_format`). Of the dense weights, quantised
are those of plain `nn.Linear` and `nn.Embedding` modules with at least 32 rows and columns, outside of routers: a
router's choice is too delicate, and norms, biases and narrow matrices (such as a shared expert's gate) weigh nothing.
With `int4`, the embedding and the head are int8: in 4 bits they alone cost the demo 5 % of perplexity. `int4s` spares
nothing, for comparisons at equal bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from expertd_engine.errors import ModelError, UsageError
from expertd_engine.experts.store_format import (
    ALIGNMENT,
    TARGETS,
    QuantisedTensor,
    RecordLayout,
    TensorSpec,
    tensor_bytes,
)
from expertd_engine.families import DTYPES, Model, dense_dtype_plan, find_experts
from expertd_engine.kernels.formats import QUANTISED, packed_bytes
from expertd_engine.kernels.row_order import FP8
from expertd_engine.tensor_file import TensorShape

FORMATS = (*DTYPES, *QUANTISED)
"""Formats of weights, as the user names them."""
EXPERT_FORMATS = (*FORMATS, FP8)
"""Formats of experts; fp8 is read by GPUs alone."""

_TENSOR_ALIGNMENT = 64
_SMALLEST_SIDE = 32
_ROUTERS = ("gate", "router")
"""What the module beside the experts that chooses among them is called, in every family that we serve."""
_ROUTER_AHEAD = "router."
"""Where a pre-gated model has its one router."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One MoE layer as it will lie in experts.bin."""

    module: str
    num_experts: int
    layout: RecordLayout
    layout_index: int
    offset: int

    @property
    def size(self) -> int:
        return self.num_experts * self.layout.bytes


def check_format(name: str, what: str, allowed: Sequence[str] = FORMATS) -> None:
    """Raise UsageError unless `name` is a format of weights; `what` says whose."""
    if name not in allowed:
        raise UsageError(f"{what} format {name!r} is not known: allowed are {', '.join(allowed)}")


def check_experts_format(name: str, order: str) -> None:
    """Raise UsageError unless records of this order can be in format `name`."""
    check_format(name, "experts", EXPERT_FORMATS)
    if name == FP8 and order != TARGETS["gpu"]:
        raise UsageError("experts format 'fp8' is read by GPUs alone: add `--for gpu`, or choose int8 for a CPU")


def dense_format_beside(experts_format: str) -> str:
    """The format of the other matrices where the user names none: that of the experts, bf16 beside fp8."""
    return "bf16" if experts_format == FP8 else experts_format


def compute_dtype(dense_format: str) -> str:
    """What a model with such dense weights computes in: `bf16` with bf16 weights, else `float32`."""
    return "bf16" if dense_format == "bf16" else "float32"


def plan_records(
    model: Model, experts_format: str, order: str = "strips"
) -> tuple[list[LayerPlan], list[RecordLayout]]:
    """The layers in forward order, back to back, and the distinct layouts of their records. Raises ModelError."""
    layouts: list[RecordLayout] = []
    layers: list[LayerPlan] = []
    offset = 0
    for name, module in find_experts(model):
        shapes, num_experts = _record_shapes(name, module)
        layout = lay_out(shapes, experts_format, order)
        if layout not in layouts:
            layouts.append(layout)
        layers.append(LayerPlan(name, num_experts, layout, layouts.index(layout), offset))
        offset += layers[-1].size
    return layers, layouts


def lay_out(shapes: Mapping[str, Sequence[int]], experts_format: str, order: str = "strips") -> RecordLayout:
    """The record of tensors of these names and shapes, in their order: matrices in the format, vectors in float32.

    `order` is one of `store_format.ORDERS`.
    """
    matrices = _stored_name(experts_format)
    specs, end = [], 0
    for name, shape in shapes.items():
        dtype = matrices if len(shape) == 2 else "float32"
        offset = _round_up(end, _TENSOR_ALIGNMENT)
        specs.append(TensorSpec(name, dtype, list(shape), offset))
        end = offset + tensor_bytes(dtype, shape, order)
    return RecordLayout(experts_format, _round_up(end, ALIGNMENT), specs, order)


def plan_quantised(model: Model, dense_format: str) -> dict[str, QuantisedTensor]:
    """Name → form of the dense weights that are quantised in `dense_format`; none where that is a plain one."""
    if dense_format not in QUANTISED:
        return {}
    stored = dense_dtype_plan(model, DTYPES[compute_dtype(dense_format)])
    found = {f"{name}.weight": module for name, module in model.named_modules() if _is_matrix(module)}
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    routers = tuple(f"{name.rpartition('.')[0]}.{router}." for name, _ in find_experts(model) for router in _ROUTERS)
    return {
        name: QuantisedTensor(_form(dense_format, id(module) in ends), list(module.weight.shape))
        for name, module in found.items()
        if name in stored and not name.startswith((*routers, _ROUTER_AHEAD))
    }


def _form(dense_format: str, is_end: bool) -> str:
    return "int8" if is_end and dense_format == "int4" else dense_format


def _is_matrix(module: nn.Module) -> bool:
    # A subclass may use its weight in its own way (scaled embeddings do): only the plain classes are replaced.
    return type(module) in (nn.Linear, nn.Embedding) and min(module.weight.shape) >= _SMALLEST_SIDE  # type: ignore[arg-type]  # both have a weight


def _record_shapes(name: str, module: nn.Module) -> tuple[dict[str, list[int]], int]:
    """The shapes of one expert's tensors, and the number of experts. ModelError for an experts class unlike others."""
    parameters = dict(module.named_parameters())
    counts = {parameter.shape[0] for parameter in parameters.values()}
    known = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    if len(counts) != 1 or parameters.keys() - {f"{one}_bias" for one in known} != known:
        raise ModelError(
            f"{name} ({type(module).__name__}) cannot be served: its weights are not one slice an expert of "
            f"{' and '.join(sorted(known))}"
        )
    example = {own: torch.empty(parameter.shape[1:], device="meta") for own, parameter in parameters.items()}
    return {own: list(tensor.shape) for own, tensor in canonical(module, example).items()}, counts.pop()


def canonical(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One expert's slices of an experts module's parameters as a record's tensors: views, in the record's order.

    The module's class says how they lie (`has_gate`, `is_transposed`, `is_concatenated`; transformers'
    `integrations/moe.py`).
    """
    if module.is_transposed:
        tensors = {name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    split: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith("gate_up_proj"):
            split[name] = tensor
        elif module.is_concatenated:
            split[name.replace("gate_up", "gate")], split[name.replace("gate_up", "up")] = tensor.chunk(2)
        else:
            split[name.replace("gate_up", "gate")], split[name.replace("gate_up", "up")] = tensor[::2], tensor[1::2]
    order = ("gate_proj", "up_proj", "down_proj", "gate_proj_bias", "up_proj_bias", "down_proj_bias")
    return {name: split[name] for name in order if name in split}


def _stored_name(format: str) -> str:
    return str(DTYPES[format]).removeprefix("torch.") if format in DTYPES else format


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def dense_shapes(model: Model, dtype: torch.dtype, quantised: Mapping[str, QuantisedTensor]) -> dict[str, TensorShape]:
    """What dense.safetensors will hold."""
    state, shapes = model.state_dict(), {}
    for name, kind in dense_dtype_plan(model, dtype).items():
        if name in quantised:
            rows, cols = quantised[name].shape
            shapes[name] = TensorShape(torch.uint8, (packed_bytes(quantised[name].format, rows, cols),))
        else:
            shapes[name] = TensorShape(kind, tuple(state[name].shape))
    return shapes
