"""The experts that a sequence's known tokens will use, where a router that reads tokens alone has said so. Pure.

Owned by the sequence, filled by whoever runs the router. They depend on the tokens alone, so they outlive preemption.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

Union: TypeAlias = tuple[frozenset[int], ...]
"""Distinct experts that some tokens use together, head by head."""


@dataclass(frozen=True, slots=True)
class PathShape:
    """`heads` choices of `top_k` experts a token. One head holds in all layers, else each layer has its own."""

    heads: int
    top_k: int

    @property
    def stride(self) -> int:
        return self.heads * self.top_k


class Paths:
    """Experts and weights of the first `len` known tokens of a sequence, `[token][head][choice]`, flat."""

    __slots__ = ("experts", "shape", "stored", "weights")

    def __init__(self, shape: PathShape) -> None:
        self.shape = shape
        self.experts = array("H")
        self.weights = array("f")
        self.stored = 0
        """Tokens whose router keys and values lie in the sequence's KV blocks."""

    def __len__(self) -> int:
        return len(self.experts) // self.shape.stride

    def extend(self, experts: bytes, weights: bytes) -> None:
        """Those of the next tokens, as uint16 and float32."""
        self.experts.frombytes(experts)
        self.weights.frombytes(weights)

    def union(self, start: int, stop: int) -> Union:
        """Experts of the tokens at positions `start` to `stop` (exclusive), as far as they are known."""
        heads, top_k, stride = self.shape.heads, self.shape.top_k, self.shape.stride
        chosen = self.experts[start * stride : stop * stride]
        return tuple(
            frozenset().union(*(chosen[head * top_k + choice :: stride] for choice in range(top_k)))
            for head in range(heads)
        )


def join(unions: Iterable[Union]) -> Union:
    """Experts that any of them uses; empty without any."""
    return tuple(frozenset().union(*heads) for heads in zip(*unions, strict=True))
