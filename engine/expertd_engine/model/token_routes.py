"""Where tokens will probably be sent, layer by layer, by what they are alone: known as soon as a token is sampled.

A low-rank map from the token's embedding to every router's logits, fitted by `expertd profile`. On a fine-grained
model (64 experts, top-8) the 8 experts that it names first have 73 % of a token's gate weight, 12 have 86 %. Owns the
file that lies beside the store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from expertd_engine.arrays_file import ArraysFile
from expertd_engine.kernels.library import FORMATS, Library, Matrix
from expertd_engine.model.substitution import Floats

TOKEN_ROUTES_NAME = "token_routes.safetensors"
RANK = 128
RIDGE = 0.3
_PIECE = 4096
_NAMED = 1.5
"""Experts named, of top-k. At four times top-k slots that lowers KL from 0.025 to 0.019 nats a token; twice top-k names
half as many more for no more than that."""
_ROWS = 64
"""Of a larger step the last ones are asked about: those that come next are most like them."""


Embed = Callable[[Sequence[int]], Floats]
"""Tokens to what stands before the first layer, `[T, H]`."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenMap:
    """Logits of token t in layer l: `(tokens[t] @ up + bias)[l]`."""

    tokens: NDArray[np.float16]
    """`[V, R]`"""
    up: Floats
    """`[R, L * E]`, E of the widest layer; experts that a layer does not have get -1e30 by `bias`."""
    bias: Floats
    """`[L * E]`"""
    shares: Floats
    """`[L, E]`: of the gate weight that each layer gave each expert on the text of the fit."""


Ask = Callable[[NDArray[np.float16]], Floats]
"""Of rows `[T, R]`, as `TokenRoutes.expected`."""


class TokenRoutes:
    """Asks a map. `top_k` as the routers'."""

    def __init__(self, numbers: TokenMap, top_k: int, library: Library | None = None) -> None:
        """`library` computes; without, numpy does. Either multiplies by `up` in bf16: every step reads all of it from
        memory while it waits for the answer."""
        up = torch.from_numpy(numbers.up).to(torch.bfloat16)
        numbers = replace(numbers, up=up.float().numpy())
        self._tokens = numbers.tokens
        named = min(math.ceil(_NAMED * top_k), numbers.shares.shape[1])
        self._ask: Ask = (
            partial(_by_numpy, numbers, named) if library is None else NativeRoutes(numbers, up, named, library)
        )

    def expected(self, token_ids: Sequence[int]) -> Floats:
        """`[L, E]`: the share of each layer's gate weight that these tokens will probably give each expert. Good until
        the next call."""
        return self._ask(self._tokens[list(token_ids[-_ROWS:])])


def _by_numpy(numbers: TokenMap, named: int, rows: NDArray[np.float16]) -> Floats:
    layers, experts = numbers.shares.shape
    # no BLAS: its threads go on spinning on the cores that the layers want
    logits = (np.einsum("tr,re->te", rows.astype(np.float32), numbers.up) + numbers.bias).reshape(-1, experts)
    least = np.partition(logits, -named, axis=1)[:, -named, None]
    weights = np.exp(np.where(logits >= least, logits - logits.max(axis=1, keepdims=True), -np.inf))
    weights /= weights.sum(axis=1, keepdims=True)
    shares: Floats = weights.reshape(-1, layers, experts).mean(axis=0)
    return shares


class NativeRoutes:
    """An `Ask` in one native call: numpy's dozen small steps find every cache cold between two steps of a model."""

    def __init__(self, numbers: TokenMap, up: torch.Tensor, named: int, library: Library) -> None:
        """`up`: the map's, in bf16."""
        self._call = library.bind(
            "expertd_foresee", [POINTER(Matrix), c_void_p, c_int64, *[c_int32] * 3, c_void_p, c_void_p]
        )
        self._up, self._bias = up.T.contiguous(), numbers.bias
        self._map = Matrix(self._up.data_ptr(), self._bias.ctypes.data, FORMATS["bfloat16"], *self._up.shape)
        self._rows = np.empty((_ROWS, len(numbers.up)), np.float32)
        self._logits = np.empty((_ROWS, len(self._up)), np.float32)
        self._shares = np.empty(numbers.shares.shape, np.float32)
        self._given = byref(self._map), self._rows.ctypes.data
        self._sizes = (*self._shares.shape, named)
        self._results = self._logits.ctypes.data, self._shares.ctypes.data
        """Addresses are kept: to tell one takes numpy up to ten microseconds."""

    def __call__(self, rows: NDArray[np.float16]) -> Floats:
        self._rows[: len(rows)] = rows
        self._call(*self._given, len(rows), *self._sizes, *self._results)
        return self._shares


_FILE = ArraysFile.of(TOKEN_ROUTES_NAME, 1, TokenMap, "expertd profile")


def write_token_map(folder: Path, numbers: TokenMap, store_id: str) -> Path:
    """Raises StoreError where the folder cannot be written to."""
    return _FILE.write(folder, numbers, store_id)


def has_token_map(folder: Path) -> bool:
    return _FILE.is_in(folder)


def read_token_map(folder: Path, store_id: str) -> TokenMap:
    """Raises StoreError where there is none, or none of this store and version."""
    return TokenMap(**_FILE.read(folder, store_id))


class MapFit:
    """Fits a map to what routers said, some tokens at a time, by least squares over embeddings of length 1."""

    def __init__(self, embed: Embed, experts: Sequence[int]) -> None:
        """`experts[l]`: how many layer l has."""
        self._embed = embed
        self._experts = experts
        width = len(experts) * max(experts)
        size = embed([0]).shape[1] + 1
        self._seen = np.zeros((size, size), np.float64)
        self._told = np.zeros((size, width), np.float64)
        self._shares = np.zeros((len(experts), max(experts)), np.float64)

    def add(self, token_ids: Sequence[int], logits: Floats, shares: Floats) -> None:
        """Tokens `[T]`, what every router said of them `[T, L, E]`, and the gate weight `[L, E]` that they gave."""
        rows = _with_one(self._embed(token_ids)).astype(np.float64)
        self._seen += rows.T @ rows
        self._told += rows.T @ logits.reshape(len(rows), -1)
        self._shares += shares

    def fit(self, vocabulary: int, rank: int = RANK, ridge: float = RIDGE) -> TokenMap:
        """The best map of that rank for what was added; `ridge` counts like so many tokens in every direction."""
        size, width = self._told.shape
        damped = self._seen + ridge * np.eye(size)
        damped[-1, -1] -= ridge  # the constant
        solved = np.linalg.solve(damped, self._told)
        _, _, directions = np.linalg.svd(np.linalg.cholesky(damped).T[:-1, :-1] @ solved[:-1], full_matrices=False)
        up = directions[: min(rank, size - 1, width)]
        bias = solved[-1].reshape(self._shares.shape).copy()
        for layer, count in enumerate(self._experts):
            bias[layer, count:] = -1e30
        tokens = self._tokens(vocabulary, (solved[:-1] @ up.T).astype(np.float32))
        total = np.maximum(self._shares.sum(axis=1, keepdims=True), 1e-30)
        found = (up, bias.reshape(-1), self._shares / total)
        return TokenMap(tokens, *(np.ascontiguousarray(part, np.float32) for part in found))

    def _tokens(self, vocabulary: int, down: Floats) -> NDArray[np.float16]:
        """`[V, R]`, piece by piece."""
        tokens = np.empty((vocabulary, down.shape[1]), np.float16)
        for begin in range(0, vocabulary, _PIECE):
            ids = range(begin, min(begin + _PIECE, vocabulary))
            tokens[begin : ids.stop] = _with_one(self._embed(ids))[:, :-1] @ down
        return tokens


def _with_one(embeddings: Floats) -> Floats:
    """Rows of length 1, and a constant."""
    lengths = np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    return np.concatenate([embeddings / lengths, np.ones((len(embeddings), 1), np.float32)], axis=1, dtype=np.float32)
