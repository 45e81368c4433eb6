"""Runs text token by token through a real engine and compares what it says in one mode with another. Owns the taps.

Token by token, because a prompt computed in one step routes all its tokens among the experts held before it: quality
measured so would say nothing of an answer, where the held experts move with every token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertd_engine.config import Config
from expertd_engine.core import Forward, StepResult
from expertd_engine.errors import EngineError
from expertd_engine.experts.held import HeldExperts
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.swaps import SwapLimits
from expertd_engine.experts.virtual import VirtualExperts
from expertd_engine.experts.virtual_paths import VirtualPaths
from expertd_engine.messages import ExpertMode, Sampling, Submit, TextInput
from expertd_engine.model.kv_storage import KVStorage
from expertd_engine.model.moe import MoELayer
from expertd_engine.model.path_routing import PathRouting
from expertd_engine.model.runner import Runner
from expertd_engine.model.step_model import StepModel
from expertd_engine.model.step_routes import StepRoutes
from expertd_engine.model.step_rows import StepRows
from expertd_engine.model.substitution import Floats
from expertd_engine.model.token_routes import MapFit
from expertd_engine.model.virtual_routing import Score, VirtualRouting
from expertd_engine.planning.replay import Choice
from expertd_engine.startup import Engine, start_engine
from expertd_engine.step_plan import StepPlan

Window = Sequence[int]
"""Token ids; the model sees nothing before the first."""

ONE_TOKEN = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)


@dataclass(frozen=True, slots=True)
class Told:
    """What the engine said of some windows, token by token."""

    logprobs: list[Tensor]
    """`[tokens, V]` of each window, float16."""
    steps_s: list[float]
    """Seconds of each step, a token each."""
    stalls_s: list[float]
    """Of these: stood still."""

    def losses(self, windows: Sequence[Window]) -> list[float]:
        """Negative log-probability of every token but the first of each window, nats."""
        found: list[float] = []
        for rows, window in zip(self.logprobs, windows, strict=True):
            following = torch.tensor(window[1:])[:, None]
            found += (-rows[:-1].float().gather(1, following)[:, 0]).tolist()
        return found

    def divergences(self, other: Told) -> list[float]:
        """KL divergence of the other's next-token distributions from these, for each token, nats."""
        found: list[float] = []
        for mine, theirs in zip(self.logprobs, other.logprobs, strict=True):
            p, q = mine.float(), theirs.float()
            found += (p.exp() * (p - q)).nan_to_num(0.0).sum(dim=1).tolist()
        return found


class _Tap:
    """A `StepModel` that also keeps the log-probabilities of every step."""

    def __init__(self, model: StepModel) -> None:
        self.rows: list[Tensor] = []
        self._model = model

    def forward(self, rows: StepRows, storage: KVStorage, layers: Sequence[MoELayer], routes: StepRoutes) -> Tensor:
        logits = self._model.forward(rows, storage, layers, routes)
        self.rows.append(logits.log_softmax(dim=-1).clamp(min=-60000).half())
        return logits

    def embeddings(self, token_ids: Sequence[int]) -> Tensor:
        return self._model.embeddings(token_ids)


class RouteRecorder(VirtualRouting):
    """Substitutes nothing, and keeps what every router chose."""

    routes_natively = False

    def __init__(self, model: VirtualRouting) -> None:
        super().__init__(model.routers, model.held, model.score, model.foresight)
        self.tokens = model.tokens
        self._foreseen: list[dict[int, float]] = []
        """By row, for the layer about to be routed."""
        self._ahead: list[Floats] = []
        """By row, `[L, E]`, where tokens tell."""
        self.choices: list[list[Choice]] = [[] for _ in model.routers]
        """By MoE layer, then token."""

    def begin_step(self, limits: Sequence[float], token_ids: Sequence[int]) -> bool:
        follows = self.tokens is not None and self.held.sets.limits.foreseen > 0
        self._ahead = [self.tokens.expected([token]).copy() for token in token_ids] if self.tokens and follows else []
        return True

    def end_step(self, sequences: int) -> None:
        return None

    def route(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        chosen, weights = top_k_index.numpy(), top_k_weights.float().numpy()
        lengths: NDArray[np.float32] = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32).numpy()
        values = self.score(layer, lengths, chosen, weights)
        rows = zip(chosen.tolist(), weights.tolist(), values.tolist(), self._expected(layer, hidden), strict=True)
        self.choices[layer] += [Choice(*row) for row in rows]
        return top_k_index, top_k_weights

    def _expected(self, layer: int, hidden: Tensor) -> list[dict[int, float]]:
        """By row, what its token, or the layer before, foresaw for this one; asks about the next."""
        if self._ahead:
            return [_named(rows[layer]) for rows in self._ahead]
        foreseen = self._foreseen if layer and self._foreseen else [{} for _ in hidden]
        if self.foresight is not None and layer + 1 < len(self.routers):
            self._foreseen = [self.foresight.expected(layer, row[None]) for row in hidden]
        return foreseen

    def routes(self) -> list[list[Sequence[int]]]:
        """Experts by token and layer."""
        return [[choice.experts for choice in layers] for layers in zip(*self.choices, strict=True)]


def _named(shares: Floats) -> dict[int, float]:
    return {expert: float(shares[expert]) for expert in np.flatnonzero(shares).tolist()}


class LogitRecorder(VirtualRouting):
    """Substitutes nothing, and fits a token map to what every router said. Steps of one sequence."""

    routes_natively = False

    def __init__(self, model: VirtualRouting, fit: MapFit) -> None:
        super().__init__(model.routers, model.held, model.score)
        self._fit = fit
        self._token_ids: Sequence[int] = ()
        self._told: list[Floats] = []
        self._shares: list[Floats] = []

    def begin_step(self, limits: Sequence[float], token_ids: Sequence[int]) -> bool:
        self._token_ids = token_ids
        self._told, self._shares = [], []
        return True

    def end_step(self, sequences: int) -> None:
        width = max(map(len, self.masks))
        logits = np.stack([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in self._told], axis=1)
        shares = np.stack([np.pad(part, (0, width - len(part))) for part in self._shares])
        self._fit.add(self._token_ids, logits, shares)

    def route(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.routers[layer].logits(hidden) if self.logits is None else self.logits
        self._told.append(logits.float().numpy().copy())
        sums = np.bincount(top_k_index.numpy().ravel(), top_k_weights.float().numpy().ravel(), len(self.masks[layer]))
        self._shares.append(sums.astype(np.float32))
        return top_k_index, top_k_weights


def with_slots(
    model: VirtualRouting,
    slots: Sequence[int],
    limits: SwapLimits | None = None,
    *,
    priors: Sequence[Sequence[float]] | None = None,
    score: Score | None = None,
    foresees: bool = True,
    shared_by: int | None = None,
) -> VirtualRouting:
    """The model's virtual mode with so many slots in each layer, and sets of its own: `close` them before the next.

    `limits`, `priors`, `score` and `shared_by` are the model's where they are not given; so is foresight, unless told
    otherwise.
    """
    sets = model.held.sets
    fresh = VirtualExperts(priors or sets.priors, sets.top_k, limits or sets.limits)
    room = replace(model.held.room, wanted=slots, share=1.0, divide=None)
    held = HeldExperts(model.held.cache, fresh, room, model.held.library)
    foresight = model.foresight if foresees else None
    tokens = model.tokens if foresees else None
    return VirtualRouting(model.routers, held, score or model.score, foresight, shared_by or model.shared_by, tokens)


def with_paths(
    model: PathRouting,
    paths: int,
    limits: SwapLimits | None = None,
    prior: Sequence[float] | None = None,
    kind: type[PathRouting] = PathRouting,
) -> PathRouting:
    """As `with_slots`, of so many whole paths."""
    layers = len(model.held.room.experts)
    sets = VirtualPaths(prior or model.sizes, layers, limits or model.sets.limits)
    room = replace(model.held.room, wanted=[paths] * layers, share=1.0)
    return kind(sets, HeldExperts(model.held.cache, sets, room), model.sizes)


class SomeLayers(VirtualRouting):
    """Virtual mode in some layers alone; the others are computed exactly."""

    routes_natively = False

    def __init__(self, model: VirtualRouting, layers: Collection[int]) -> None:
        super().__init__(model.routers, model.held, model.score, model.foresight, model.shared_by, model.tokens)
        self._chosen = frozenset(layers)

    def route(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._chosen:
            return top_k_index, top_k_weights
        return super().route(layer, hidden, top_k_index, top_k_weights)


class TextEngine:
    """A real engine that is fed text, a token a step."""

    def __init__(self, store: ExpertStore, config: Config) -> None:
        self._reading = False
        """A text is being fed: its tokens count as generated ones, or the cache would take them for a scan (law 5)."""
        self.engine: Engine = start_engine(store, config, os.getpid(), lambda stage, fraction: None, self._wrap)
        scheduler = self.engine.core.scheduler
        self._limits = scheduler.limits
        self._next_id = 1

    def close(self) -> None:
        self.engine.cache.close()

    def _wrap(self, runner: Runner) -> Forward:
        def forward(plan: StepPlan) -> StepResult:
            if self._reading:
                for chunk in plan.chunks:
                    chunk.sequence.prefill_end = 0
            return runner(plan)

        return forward

    @property
    def any_virtual(self) -> VirtualRouting | PathRouting | None:
        """The model's own virtual mode, of either kind."""
        return self.virtual or self.paths

    @property
    def virtual(self) -> VirtualRouting | None:
        """The model's own virtual mode, where each layer chooses."""
        virtual = self.engine.runner.virtual
        return virtual if isinstance(virtual, VirtualRouting) else None

    @property
    def paths(self) -> PathRouting | None:
        """The model's own virtual mode, where one index holds in all layers."""
        virtual = self.engine.runner.virtual
        return virtual if isinstance(virtual, PathRouting) else None

    def tell(
        self,
        windows: Sequence[Window],
        routing: VirtualRouting | PathRouting | None = None,
        *,
        settle: bool = True,
        at_once: int = 1,
    ) -> Told:
        """What the engine says of the windows: exact, or as `routing` has it. Steps have `at_once` tokens.

        With `settle`, loads of held experts end between steps, and those foreseen before the layer that they are for,
        so that results depend on nothing but the text.
        """
        mode: ExpertMode = "exact" if routing is None else "virtual"
        runner, scheduler = self.engine.runner, self.engine.core.scheduler
        own, model = runner.virtual, runner.model
        tap = runner.model = _Tap(model)
        runner.virtual = own if routing is None else routing
        if routing is not None:
            routing.settles = settle
        scheduler.limits = replace(self._limits, max_step_tokens=at_once)
        told = Told([], [], [])
        self._reading = True
        try:
            for window in windows:
                tap.rows.clear()
                self._feed(window, mode, told, routing if settle else None)
                told.logprobs.append(torch.cat(tap.rows)[: len(window)])
        finally:
            self._reading = False
            runner.virtual, runner.model, scheduler.limits = own, model, self._limits
        return told

    def _feed(
        self, window: Window, mode: ExpertMode, told: Told, settling: VirtualRouting | PathRouting | None
    ) -> None:
        core, stalls = self.engine.core, self.engine.cache.stalls
        core.submit(Submit(self._next_id, [TextInput(list(window))], ONE_TOKEN, mode=mode), 0.0)
        self._next_id += 1
        while core.has_work:
            before, began = stalls.total_s, time.perf_counter()
            result = core.step(0.0)
            told.steps_s.append(time.perf_counter() - began)
            told.stalls_s.append(stalls.total_s - before)
            if settling is not None and settling.held.sets.is_open:
                settling.held.settle()
            for finished in result.finished:
                if finished.error:
                    raise EngineError(f"a window could not be computed: {finished.error}")
