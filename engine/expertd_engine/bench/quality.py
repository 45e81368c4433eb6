"""`expertd bench quality`: what virtual mode costs in quality, beside the baselines, on the code that serves.

Each method is one choice of score, of first sets and of swap limits for the same held sets and the same masked
selection; cache-prior routing, which may fetch, differs in the selection alone. Text is computed token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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
from expertd_engine.bench.quality_paths import PathQuality
from expertd_engine.bench.quality_points import CACHE_PRIOR, FACTORS, QualityBench, describe, draw
from expertd_engine.calibration import RouteRecorder, TextEngine, Window, with_slots
from expertd_engine.config import Config
from expertd_engine.console import Progress, silent
from expertd_engine.errors import UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.swaps import SwapLimits
from expertd_engine.model.virtual_routing import VirtualRouting
from expertd_engine.planning.profile import Profile
from expertd_engine.planning.replay import Choice
from expertd_engine.planning.split import split_slots
from expertd_engine.profile_file import has_profile, read_profile

WINDOW = 256
CALIBRATION = 2
"""Windows of other text, for static pruning; `expertd profile` takes its text from there, too."""
METHODS = (
    "planned", "even", "foreseen", "genetic", "importance", "swapmoe", "counts", "norms", "gate-norms", "random",
    "cache-prior",
)  # fmt: skip
"""`planned` is what is served where there is a profile, `importance` where there is none. `even` is `planned` with as
many slots in each layer; `genetic` splits them by SwapMoE's search, from the same profile; `foreseen` has swaps on
the way to a layer. In `swapmoe` one expert answers for one. Then SwapMoE by token counts, static pruning by ‖E‖ and
by gate × norm on other text, random sets, all masked as the papers have it; cache-prior routing, which may fetch."""

SPLITS = ("planned", "foreseen", "genetic")
"""Methods that give layers unequal slots, by the store's profile."""


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


class LayerQuality(QualityBench):
    """Of models whose layers choose for themselves."""

    methods = METHODS

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
        super().__init__(text, windows, text.virtual)
        self._calibration = calibration
        self._calibrated: list[list[Choice]] = []
        """What routers chose there."""
        self._norms = norms
        self._profile = profile
        self._model: VirtualRouting = text.virtual

    # ------------------------------------------------------------ methods

    def _fits(self, method: str, factor: float) -> bool:
        profiled = self._profile is not None and bool(self._profile.model.layers)
        return super()._fits(method, factor) and (method not in SPLITS or profiled)

    def _slots(self, method: str, factor: float) -> list[int]:
        even = super()._slots(method, factor)
        if method not in SPLITS or self._profile is None:
            return even
        curves, room = self._profile.model.layers, sum(even)
        if method == "genetic":
            return genetic_split(curves, [1] * len(even), room)
        return split_slots(curves, [1] * len(even), room)

    def _routing(self, method: str, slots: Sequence[int]) -> VirtualRouting:
        served, moving = self._model.held.sets.limits, SwapLimits(in_flight=len(self._experts))
        still = replace(moving, per_step=0, ahead=0)
        after = replace(served, foreseen=0, ahead=0, per_step=1, half_life=moving.half_life)
        published = partial(with_slots, self._model, slots, foresees=False, shared_by=1)
        made: dict[str, Callable[[], VirtualRouting]] = {
            "planned": lambda: with_slots(self._model, slots, served),
            "even": lambda: with_slots(self._model, slots, served),
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
        bench = _bench(text, store, windows, calibration)
        points = bench.points(methods, factors or FACTORS, progress)
    finally:
        text.close()
    if png is not None:
        draw(points, store.index.top_k, png)
    values = {"perplexity": bench.perplexity, "tokens": sum(map(len, windows)), "points": msgspec.to_builtins(points)}
    told = describe(bench.perplexity, sum(map(len, windows)), points)
    return f"{told}\n{msgspec.json.encode(values).decode()}"


def _bench(
    text: TextEngine, store: ExpertStore, windows: Sequence[Window], calibration: Sequence[Window]
) -> QualityBench:
    if text.paths is not None:
        return PathQuality(text, windows, calibration, text.paths)
    norms = [layer.norms or [1.0] * layer.num_experts for layer in store.index.layers]
    return LayerQuality(text, windows, calibration, norms, read_profile(store) if has_profile(store) else None)
