"""Dense layers over matrices as the store has them, quantised or not. Owns the modules that stand in for transformers'
`nn.Linear` and `nn.Embedding`, and the torch path for boxes without the native library.

Products with a quantised matrix are those of the native kernels: activations are rounded to int8 in groups of 32, with
scale amax/127. The torch path does the same in float32, so both give the same numbers but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from expertd_engine.kernels import library
from expertd_engine.kernels.formats import GROUP_COLUMNS, QUANTISED, STRIP_ROWS, dequantise, strip_bytes
from expertd_engine.kernels.library import Pool

_BLOCK_WEIGHTS = 4 * 2**20
"""Weights dequantised at a time in the torch path: 16 MiB, whatever the matrix."""


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """W `[rows, cols]` of y = W x. `data` is flat bytes where `format` is quantised, else W itself."""

    data: Tensor
    format: str
    """`float32`, `bfloat16`, or one of `kernels.formats.QUANTISED`."""
    rows: int
    cols: int


class MatrixKernels(Protocol):
    """Who multiplies: the native library, or torch."""

    def matmul(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor:
        """x `[T, cols]` to W x + bias `[T, rows]`, all in float32."""
        ...

    def rows(self, matrix: Matrix, ids: Tensor) -> Tensor:
        """Rows `ids` `[T]` of W, float32 `[T, cols]`."""
        ...


class TorchMatrices:
    """`MatrixKernels` in torch. Quantised matrices are dequantised, block by block, for each product: slow."""

    def matmul(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor:
        if matrix.format not in QUANTISED:
            dtype = matrix.data.dtype
            return linear(x.to(dtype), matrix.data, None if bias is None else bias.to(dtype)).float()
        x = round_activations(x)
        out = torch.empty(len(x), matrix.rows)
        for first, block in _blocks(matrix):
            out[:, first : first + len(block)] = linear(x, block)
        return out if bias is None else out.add_(bias)

    def rows(self, matrix: Matrix, ids: Tensor) -> Tensor:
        if matrix.format not in QUANTISED:
            return matrix.data.index_select(0, ids).float()
        strips = matrix.data.numpy().reshape(-1, strip_bytes(matrix.format, matrix.cols))
        wanted = ids.numpy()
        found = dequantise(strips[wanted // STRIP_ROWS], matrix.format, len(wanted) * STRIP_ROWS, matrix.cols)
        return torch.from_numpy(found[np.arange(len(wanted)) * STRIP_ROWS + wanted % STRIP_ROWS])


class NativeMatrices:
    """`MatrixKernels` of the native library, on the threads of `pool`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._made: dict[int, library.Matrix] = {}

    def matmul(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        y = torch.empty(len(x), matrix.rows)
        native = self._native(matrix)
        native.bias = None if bias is None else bias.data_ptr()
        self._pool.matmul(native, x.data_ptr(), len(x), y.data_ptr())
        return y

    def rows(self, matrix: Matrix, ids: Tensor) -> Tensor:
        ids = ids.contiguous()
        out = torch.empty(len(ids), matrix.cols)
        self._pool.library.rows(self._native(matrix), ids.data_ptr(), len(ids), out.data_ptr())
        return out

    def _native(self, matrix: Matrix) -> library.Matrix:
        address = matrix.data.data_ptr()
        if address not in self._made:
            self._made[address] = library.Matrix(
                address, None, library.FORMATS[matrix.format], matrix.rows, matrix.cols
            )
        return self._made[address]


class QuantisedLinear(nn.Module):
    """`nn.Linear` over a `Matrix`: x `[..., cols]` to `[..., rows]` in x's dtype."""

    def __init__(self, matrix: Matrix, bias: nn.Parameter | None, kernels: MatrixKernels) -> None:
        super().__init__()
        self.in_features, self.out_features = matrix.cols, matrix.rows
        self.matrix = matrix
        self.bias = bias
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).float()
        bias = None if self.bias is None else self.bias.float()
        return self.kernels.matmul(self.matrix, flat, bias).to(x.dtype).view(*x.shape[:-1], self.out_features)


class QuantisedEmbedding(nn.Module):
    """`nn.Embedding` over a `Matrix`: ids `[...]` to `[..., cols]` in the model's dtype."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype, kernels: MatrixKernels) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.cols
        self.matrix = matrix
        self.dtype = dtype
        self.kernels = kernels

    def forward(self, ids: Tensor) -> Tensor:
        found = self.kernels.rows(self.matrix, ids.reshape(-1))
        return found.to(self.dtype).view(*ids.shape, self.embedding_dim)


def round_activations(x: Tensor) -> Tensor:
    """float32 `[..., K]` as the kernels see it: rounded to int8 in groups of 32, each with a scale of its own."""
    cols = x.shape[-1]
    groups = pad(x, (0, -cols % GROUP_COLUMNS)).unflatten(-1, (-1, GROUP_COLUMNS))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    whole = torch.where(scale > 0, groups / scale, 0).round_()
    rounded: Tensor = (whole * scale).flatten(-2)
    return rounded[..., :cols]


def _blocks(matrix: Matrix) -> Iterator[tuple[int, Tensor]]:
    """`(first row, rows from there)` of a quantised matrix in float32, cut by its shape alone."""
    strips = matrix.data.numpy().reshape(-1, strip_bytes(matrix.format, matrix.cols))
    step = max(1, _BLOCK_WEIGHTS // (STRIP_ROWS * matrix.cols))
    for begin in range(0, len(strips), step):
        first = begin * STRIP_ROWS
        rows = min(step * STRIP_ROWS, matrix.rows - first)
        block = dequantise(strips[begin : begin + step], matrix.format, rows, matrix.cols)
        yield first, torch.from_numpy(block)


def install(
    model: nn.Module,
    matrices: Mapping[str, Matrix],
    tied: Mapping[str, str],
    dtype: torch.dtype,
    kernels: MatrixKernels,
) -> None:
    """Replace the modules whose `weight` has a matrix, and those whose weight is tied to such a one (copy → original).

    Biases stay parameters of the new modules. Raises TypeError for a module that is neither of the two kinds.
    """
    for name in [*matrices, *(copy for copy, original in tied.items() if original in matrices)]:
        matrix = matrices[tied.get(name, name)]
        path = name.removesuffix(".weight")
        old = model.get_submodule(path)
        if isinstance(old, nn.Linear):
            model.set_submodule(path, QuantisedLinear(matrix, old.bias, kernels))
        elif isinstance(old, nn.Embedding):
            model.set_submodule(path, QuantisedEmbedding(matrix, dtype, kernels))
        else:
            raise TypeError(f"{path} is a {type(old).__name__}, whose weight cannot be quantised")
