"""Where the device's kernels are tested: on a GPU where there is one, else on the CPU by Triton's interpreter.

That multiplies bfloat16 matrices by their bits; once this is imported, products are of what the bits stand for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

tl = pytest.importorskip("triton.language", reason="triton is not installed (Linux on x86-64 alone has it)")
interpreter = pytest.importorskip("triton.runtime.interpreter")


def _values(operand: Any) -> Any:
    if operand.dtype.scalar == tl.bfloat16:
        return (operand.data.astype(np.uint32) << 16).view(np.float32)
    return operand.data


def _dot(self: Any, a: Any, b: Any, acc: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    # Not matmul: BLAS gives a row other bits at another place among others, a tensor core the same.
    product = np.einsum("mk,kn->mn", _values(a).astype(acc.data.dtype), _values(b).astype(acc.data.dtype))
    return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _dot
