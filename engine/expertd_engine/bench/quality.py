"""`expertd bench quality`: what virtual mode costs in quality, beside the baselines, on the code that serves.

Each method is one choice of score, of first sets and of swap limits for the same held sets and the same masked
selection; cache-prior routing, which may fetch, differs in the selection alone. Text is computed token by token.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from expertd_engine.bench.genetic import genetic_split
from expertd_engine.bench.perplexity import held_out
from expertd_engine.bench.report import table
from expertd_engine.calibration import RouteRecorder, TextEngine, Told, Window, with_slots
from expertd_engine.config import Config
from expertd_engine.console import Progress, silent
from expertd_engine.errors import UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.virtual import SwapLimits
from expertd_engine.model.virtual_routing import VirtualRouting
from expertd_engine.planning.profile import Profile
from expertd_engine.planning.replay import Choice
from expertd_engine.planning.split import split_slots
from expertd_engine.profile_file import has_profile, read_profile

FACTORS = (6.0, 4.0, 3.0, 2.0, 1.25)
"""Slots a layer, of top-k."""
CACHE_PRIOR = 0.5
"""Share of a layer's range of logits by which cache-prior routing (arXiv 2412.00099) lifts what is held."""
WINDOW = 256
CALIBRATION = 2
"""Windows of other text, for static pruning; `expertd profile` takes its text from there, too."""
METHODS = (
    "planned", "foreseen", "genetic", "importance", "swapmoe", "counts", "norms", "gate-norms", "random",
    "cache-prior",
)  # fmt: skip
"""`planned` is what is served where there is a profile, `importance` where there is none. `foreseen` is `planned` with
swaps on the way to a layer; `genetic` splits slots over layers by SwapMoE's search, from the same profile. In `swapmoe`
one expert answers for one. Then SwapMoE by token counts, static pruning by ‖E‖ and by gate × norm on other text, random
sets, all masked as the papers have it; cache-prior routing, which may fetch."""

SPLITS = ("planned", "foreseen", "genetic")
"""Methods that give layers unequal slots, by the store's profile."""


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


class CachePrior(VirtualRouting):
    """Held experts are preferred, not demanded: a choice that beats them by the margin is fetched."""

    routes_natively = False

    def route(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        chosen, weights = top_k_index.numpy(), top_k_weights.float().numpy()
        self.observe(layer, hidden, chosen, weights)
        logits = self.routers[layer].logits(hidden) if self.logits is None else self.logits
        held = torch.from_numpy(self.mask(layer))
        margin = CACHE_PRIOR * (logits.max(dim=1, keepdim=True)[0] - logits.min(dim=1, keepdim=True)[0])
        preferred, _ = self.routers[layer].select(logits + margin * held)
        allowed = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, preferred, True)
        index, shares = self.routers[layer].select(logits, allowed)
        kept = (top_k_index[:, :, None] == index[:, None, :]).any(dim=2).numpy()
        self.counts.fetched += int((~self.mask(layer)[index.numpy()]).sum())
        self.count(layer, (~kept).sum(axis=1), np.where(kept, 0, weights).sum(axis=1) / weights.sum(axis=1))
        return index, shares.to(top_k_weights.dtype)


class QualityBench:
    """Holds exact mode's answers, and tries methods against them."""

    def __init__(
        self,
        text: TextEngine,
        windows: Sequence[Window],
        calibration: Sequence[Window],
        norms: Sequence[Sequence[float]],
        profile: Profile | None = None,
    ) -> None:
        """`calibration`: other text, for the methods that want some; `norms`: each expert's ‖E‖, by layer.

        Raises UsageError for a model without virtual mode.
        """
        if text.virtual is None:
            raise UsageError("this model has no virtual mode: its routers are of no known kind")
        self._text = text
        self._windows = windows
        self._calibration = calibration
        self._calibrated: list[list[Choice]] = []
        """What routers chose there."""
        self._norms = norms
        self._profile = profile
        self._model: VirtualRouting = text.virtual
        self._experts = list(text.virtual.held.room.experts)
        self._top_k = text.virtual.held.sets.top_k
        self.exact: Told = text.tell(windows)
        self._losses = self.exact.losses(windows)

    @property
    def perplexity(self) -> float:
        """Of exact mode."""
        return math.exp(statistics.fmean(self._losses))

    def points(
        self, methods: Sequence[str] = METHODS, factors: Sequence[float] = FACTORS, progress: Progress = silent
    ) -> list[Point]:
        """Every method at every number of slots that the model has."""
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
        fits = round(factor * self._top_k) < max(self._experts)
        return fits and (method not in SPLITS or (self._profile is not None and bool(self._profile.model.layers)))

    def _slots(self, method: str, factor: float) -> list[int]:
        each = max(self._top_k, round(factor * self._top_k))
        even = [min(each, count) for count in self._experts]
        if method not in SPLITS or self._profile is None:
            return even
        curves, room = self._profile.model.layers, sum(even)
        if method == "genetic":
            return genetic_split(curves, [1] * len(even), room)
        return split_slots(curves, [1] * len(even), room)[0]

    def _routing(self, method: str, slots: Sequence[int]) -> VirtualRouting:
        served, moving = self._model.held.sets.limits, SwapLimits(in_flight=len(self._experts))
        still, after = replace(moving, per_step=0, ahead=0), replace(served, foreseen=0, ahead=0, per_step=1)
        published = partial(with_slots, self._model, slots, foresees=False, shared_by=1)
        made: dict[str, Callable[[], VirtualRouting]] = {
            "planned": lambda: with_slots(self._model, slots, served),
            "genetic": lambda: with_slots(self._model, slots, served),
            "importance": lambda: with_slots(self._model, slots, after, priors=self._norms, foresees=False),
            "foreseen": lambda: with_slots(self._model, slots, replace(after, ahead=SwapLimits().ahead)),
            "swapmoe": lambda: published(moving),
            "counts": lambda: published(moving, score=_counts),
            "norms": lambda: published(still, priors=self._norms),
            "gate-norms": lambda: published(still, priors=self._mean_importance()),
            "random": lambda: published(still, priors=_random(self._experts)),
            "cache-prior": lambda: _cache_prior(published(moving)),
        }
        if method not in made:
            raise UsageError(f"method {method!r} is not known: choose from {', '.join(METHODS)}")
        return made[method]()

    def _mean_importance(self) -> list[list[float]]:
        """Gate × norm of each expert over text that is not measured, as static pruning after calibration has it."""
        found = []
        if not self._calibrated:
            recorder = RouteRecorder(self._model)
            self._text.tell(self._calibration, recorder, settle=False)
            self._calibrated = recorder.choices
        for choices, count in zip(self._calibrated, self._experts, strict=True):
            sums = [0.0] * count
            for choice in choices:
                for expert, value in zip(choice.experts, choice.importance, strict=True):
                    sums[expert] += value
            found.append(sums)
        return found


def _counts(layer: Any, lengths: Any, chosen: Any, weights: Any) -> Any:
    return np.ones_like(weights)


def _random(experts: Sequence[int]) -> list[list[float]]:
    rng = Random(0)
    return [[rng.random() for _ in range(count)] for count in experts]


def _cache_prior(routing: VirtualRouting) -> CachePrior:
    return CachePrior(routing.routers, routing.held, routing.score)


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
    """Slots against perplexity. Raises UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--png needs matplotlib: install expertd[bench]") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(point.method for point in points):
        mine = sorted((p.slots / top_k, p.perplexity_ratio) for p in points if p.method == method)
        axes.plot(*zip(*mine, strict=True), marker="o", label=method)
    axes.set(xlabel="slots a layer, of top-k", ylabel="perplexity, of exact mode's", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def quality(
    path: Path,
    tokens: int,
    *,
    methods: Sequence[str] | None = None,
    factors: Sequence[float] | None = None,
    threads: int | None = None,
    io_threads: int = 2,
    png: Path | None = None,
    progress: Progress = silent,
) -> str:
    """Measure the store at `path` on `tokens` of text: the table, and one JSON object on the last line."""
    store = ExpertStore.open(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    count = -(-tokens // WINDOW)
    found = [window[:WINDOW] for window in held_out(tokenizer, count + CALIBRATION)]
    calibration, windows = found[:CALIBRATION], found[CALIBRATION:]
    config = Config(
        model=str(path),
        threads=threads,
        io_threads=io_threads,
        prefix_cache=False,
        max_model_len=WINDOW + 1,
        max_sequences=1,
        max_step_tokens=WINDOW,
    )
    text = TextEngine(store, config)
    try:
        norms = [layer.norms or [1.0] * layer.num_experts for layer in store.index.layers]
        bench = QualityBench(text, windows, calibration, norms, read_profile(store) if has_profile(store) else None)
        points = bench.points(methods or METHODS, factors or FACTORS, progress)
    finally:
        text.close()
    if png is not None:
        draw(points, store.index.top_k, png)
    values = {"perplexity": bench.perplexity, "tokens": sum(map(len, windows)), "points": msgspec.to_builtins(points)}
    told = describe(bench.perplexity, sum(map(len, windows)), points)
    return f"{told}\n{msgspec.json.encode(values).decode()}"
