"""The experts that a sequence's known tokens will use, where a router that reads tokens alone has said so. Pure.

Owned by the sequence, filled by whoever runs the router. They depend on the tokens alone, so they outlive preemption.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

Union: TypeAlias = tuple[frozenset[int], ...]
"""Distinct experts that some tokens use together, head by head."""


@dataclass(frozen=True, slots=True)
class PathShape:
    """`heads` choices of `top_k` experts a token. One head holds in all layers, else each layer has its own."""

    heads: int
    top_k: int
    kept_logits: int = 0
    """Of each token, with its route."""

    @property
    def stride(self) -> int:
        return self.heads * self.top_k


_NO_LOGITS = array("f")


class Routes(NamedTuple):
    """Experts (int64) and weights (float32) of some tokens, `[token][head][choice]`, flat."""

    experts: array[int]
    weights: array[float]
    logits: array[float] = _NO_LOGITS
    """What the router gave every expert, `[token][head][expert]`; empty where nobody keeps it."""

    @classmethod
    def blank(cls, tokens: int, stride: int, logits: int) -> Routes:
        """Zeros for so many tokens of `PathShape.stride` choices and so many logits."""
        floats = (array("f", bytes(4 * tokens * each)) for each in (stride, logits))
        return cls(array("q", bytes(8 * tokens * stride)), *floats)


class Paths:
    """Experts and weights of the first `len` known tokens of a sequence, `[token][head][choice]`, flat; and logits, if
    `shape` says that they are kept."""

    __slots__ = ("awaited", "experts", "logits", "shape", "stored", "weights")

    def __init__(self, shape: PathShape) -> None:
        self.shape = shape
        self.experts = array("q")
        self.weights = array("f")
        self.logits = array("f")
        self.stored = 0
        """Tokens whose router keys and values lie in the sequence's KV blocks."""
        self.awaited: Callable[[], None] | None = None
        """Brings the routes that are being worked out, and is None again; called by whoever looks at the paths."""

    def __len__(self) -> int:
        if self.awaited is not None:
            self.awaited()
        return len(self.experts) // self.shape.stride

    def extend(self, routes: Routes, start: int, stop: int) -> None:
        """The next tokens have the routes that stand at `start` to `stop` (exclusive) in `routes`."""
        first, end = start * self.shape.stride, stop * self.shape.stride
        self.experts.extend(routes.experts[first:end])
        self.weights.extend(routes.weights[first:end])
        kept = self.shape.kept_logits
        self.logits.extend(routes.logits[start * kept : stop * kept])

    def routes(self, start: int, stop: int) -> Routes:
        """Of the tokens at positions `start` to `stop` (exclusive), copied."""
        if self.awaited is not None:
            self.awaited()
        first, end = start * self.shape.stride, stop * self.shape.stride
        kept = self.shape.kept_logits
        return Routes(self.experts[first:end], self.weights[first:end], self.logits[start * kept : stop * kept])

    def union(self, start: int, stop: int) -> Union:
        """Experts of the tokens at positions `start` to `stop` (exclusive), as far as they are known."""
        if self.awaited is not None:
            self.awaited()
        stride = self.shape.stride
        return union_of(self.experts[start * stride : stop * stride], self.shape)


def union_of(experts: array[int], shape: PathShape) -> Union:
    """Of `experts` `[token][head][choice]`, flat."""
    if shape.stride == 1:
        return (frozenset(experts),)
    return tuple(
        frozenset().union(*(experts[head * shape.top_k + choice :: shape.stride] for choice in range(shape.top_k)))
        for head in range(shape.heads)
    )


def join(unions: Iterable[Union]) -> Union:
    """Experts that any of them uses; empty without any."""
    return tuple(frozenset().union(*heads) for heads in zip(*unions, strict=True))
