"""Quality of virtual mode by method and number of slots, against exact mode on the same tokens. Owns what exact mode
said; who substitutes, and how, is each bench's own.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertd_engine.bench.report import table
from expertd_engine.calibration import TextEngine, Told, Window
from expertd_engine.console import Progress, silent
from expertd_engine.errors import UsageError
from expertd_engine.model.path_routing import PathRouting
from expertd_engine.model.virtual_routing import VirtualRouting
from expertd_engine.pictures import new_figure, save

CACHE_PRIOR = 0.5
"""Share of a router's range of logits by which cache-prior routing (arXiv 2412.00099) lifts what is held."""
FACTORS = (6.0, 4.0, 3.0, 2.0, 1.25)
"""Slots a layer, of top-k."""


RATIOS = (1, 1.1, 1.2, 1.5, 2, 3)
"""Of perplexities, at the picture's edge."""


@dataclass(frozen=True, slots=True)
class Point:
    """One method at one number of slots, against exact mode on the same tokens."""

    method: str
    slots: float
    """A layer, on average."""
    perplexity_ratio: float
    divergence: float
    """KL, nats a token."""
    agreement: float
    """Share of tokens whose most likely next token is the same."""
    substituted: float
    """Share of choices."""
    mass: float
    swaps: float
    """Experts brought in for each token, fetched ones included, over all layers."""


class QualityBench(ABC):
    """Holds exact mode's answers to `windows`, and tries methods against them."""

    methods: Sequence[str]

    def __init__(self, text: TextEngine, windows: Sequence[Window], model: VirtualRouting | PathRouting) -> None:
        self._text = text
        self._windows = windows
        self._experts = list(model.held.room.experts)
        self._top_k = model.held.sets.top_k
        self.exact: Told = text.tell(windows)
        self._losses = self.exact.losses(windows)

    @property
    def perplexity(self) -> float:
        """Of exact mode."""
        return math.exp(statistics.fmean(self._losses))

    def points(
        self, methods: Sequence[str] | None = None, factors: Sequence[float] = FACTORS, progress: Progress = silent
    ) -> list[Point]:
        """Every method at every number of slots that the model has. Raises UsageError for one that is not known."""
        methods = methods or self.methods
        for method in methods:
            if method not in self.methods:
                raise UsageError(f"method {method!r} is not known: choose from {', '.join(self.methods)}")
        wanted = [(method, factor) for factor in factors for method in methods if self._fits(method, factor)]
        found = []
        for done, (method, factor) in enumerate(wanted):
            progress("quality", done / len(wanted))
            found.append(self.point(method, factor))
        return found

    def point(self, method: str, factor: float) -> Point:
        slots = self._slots(method, factor)
        routing = self._routing(method, slots)
        told = self._text.tell(self._windows, routing)
        counts = routing.counts
        brought = sum(routing.held.sets.swaps) + counts.fetched
        routing.held.close()
        tokens = max(1, counts.tokens)
        same = [
            float((mine.argmax(dim=1) == theirs.argmax(dim=1)).float().mean())
            for mine, theirs in zip(self.exact.logprobs, told.logprobs, strict=True)
        ]
        return Point(
            method=method,
            slots=statistics.fmean(slots),
            perplexity_ratio=math.exp(statistics.fmean(told.losses(self._windows)) - statistics.fmean(self._losses)),
            divergence=statistics.fmean(self.exact.divergences(told)),
            agreement=statistics.fmean(same),
            substituted=sum(counts.substituted) / max(1, sum(counts.activations)),
            mass=statistics.fmean(counts.mass) / tokens,
            swaps=brought / tokens,
        )

    # ------------------------------------------------------------ methods

    def _fits(self, method: str, factor: float) -> bool:
        return round(factor * self._top_k) < max(self._experts)

    def _slots(self, method: str, factor: float) -> list[int]:
        """Of each layer."""
        each = max(self._top_k, round(factor * self._top_k))
        return [min(each, count) for count in self._experts]

    @abstractmethod
    def _routing(self, method: str, slots: Sequence[int]) -> VirtualRouting | PathRouting:
        """With sets of its own."""


def describe(perplexity: float, tokens: int, points: Sequence[Point]) -> str:
    """The table."""
    header = ("method", "slots", "× perplexity", "KL nats", "same token", "substituted", "mass", "swaps/token")
    rows = [
        (
            p.method, f"{p.slots:.1f}", f"{p.perplexity_ratio:.4f}", f"{p.divergence:.4f}", f"{p.agreement:.1%}",
            f"{p.substituted:.1%}", f"{p.mass:.1%}", f"{p.swaps:.1f}",
        )
        for p in points
    ]  # fmt: skip
    return f"exact: perplexity {perplexity:.3f} over {tokens} tokens, one by one\n\n{table(header, rows)}"


def draw(points: Sequence[Point], top_k: int, path: Path) -> None:
    """Slots against perplexity and divergence. Raises UsageError without matplotlib."""
    figure = new_figure(10, 4.5)
    perplexity, divergence = figure.subplots(1, 2)
    for method in dict.fromkeys(point.method for point in points):
        mine = sorted((p for p in points if p.method == method), key=lambda p: p.slots)
        slots = [p.slots / top_k for p in mine]
        perplexity.plot(slots, [p.perplexity_ratio for p in mine], marker="o", label=method)
        divergence.plot(slots, [p.divergence for p in mine], marker="o", label=method)
    perplexity.set(ylabel="perplexity, of exact mode's", yscale="log")
    perplexity.set_yticks(RATIOS, map(str, RATIOS))
    perplexity.minorticks_off()
    divergence.set(ylabel="KL from exact mode, nats a token", ylim=0)
    for axes in (perplexity, divergence):
        axes.set(xlabel="slots a layer, of top-k")
        axes.grid(alpha=0.3)
    divergence.legend()
    save(figure, path)
