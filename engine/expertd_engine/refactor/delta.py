"""A trained model as a small file: which neurons went where, and all trained weights in 8 bits. Holds no state.

Rows of int8 with a scale each: for low-rank factors an error of less than a percent of the delta. Vectors are float16.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expertd_engine.errors import ModelError
from expertd_engine.refactor.dense import Dense
from expertd_engine.refactor.selection import Selection
from expertd_engine.refactor.shape import Shape
from expertd_engine.refactor.student import Student

_SELECTION = ("permanent", "experts", "fresh")


def save_delta(student: Student, path: Path, note: str = "") -> None:
    """Write what makes `student` of its dense model. `note` is free text that people read."""
    assert student.shape is not None and student.selection is not None
    tensors = {f"selection.{name}": getattr(student.selection, name).short().contiguous() for name in _SELECTION}
    for name, tensor in student.trained().items():
        if tensor.ndim < 2:
            tensors[f"exact.{name}"] = tensor.half().cpu().contiguous()
            continue
        scale = (tensor.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-8)
        tensors[f"rows.{name}"] = (tensor / scale).round().to(torch.int8).cpu().contiguous()
        tensors[f"scales.{name}"] = scale.half().clamp(min=6e-8).cpu().contiguous()
    save_file(tensors, path, {"shape": json.dumps(student.shape.to_json()), "note": note})


def load_student(dense: Dense, path: Path) -> Student:
    """The model that `save_delta` saved, over its dense model. Raises ModelError for a foreign file or dense model."""
    try:
        with safe_open(path, framework="pt") as file:
            shape = Shape.from_json(json.loads(file.metadata()["shape"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"{path} holds no trained model: {error}") from error
    selection = Selection(*(tensors[f"selection.{name}"].long() for name in _SELECTION))
    _check(dense, selection, path)
    student = Student(dense, shape, selection)
    student.load_trained(_dequantised(tensors))
    return student.eval()


def _check(dense: Dense, selection: Selection, path: Path) -> None:
    layers = len(selection.permanent)
    top = max(int(part.max()) for part in (selection.permanent, selection.experts) if part.numel())
    if layers != len(dense.layers) or top >= dense.neurons:
        raise ModelError(
            f"{path} belongs to another dense model: it has {layers} layers and neuron {top}, this one "
            f"{len(dense.layers)} layers of {dense.neurons} neurons"
        )


def _dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        kind, _, own = name.partition(".")
        if kind == "exact":
            found[own] = tensor.float()
        elif kind == "rows":
            found[own] = tensor.float() * tensors[f"scales.{own}"].float()
    return found
