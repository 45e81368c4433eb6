"""Activations by the names that kernels give them, as PyTorch computes them: what a module's own is compared with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
"""Of one operand."""
