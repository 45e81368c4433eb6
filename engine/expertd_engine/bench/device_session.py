"""An engine on a device under measurement: one start serves many cells, which differ in budget, routes and hints.

Filling the host tier and copying experts to the card takes far longer than a cell; so the engine stays and what it is
given changes. What a step's routes were is read off the generator, after the clock has stopped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import msgspec
import numpy as np
import torch

from expertd_engine.bench.engine_spec import config_of, generated
from expertd_engine.bench.generated import Announced, ChannelLookahead
from expertd_engine.bench.protocol import Decoded, EngineFacts, EngineSpec
from expertd_engine.bench.routing import Ids
from expertd_engine.bench.session import EngineSession
from expertd_engine.bench.yardstick import Yardstick
from expertd_engine.config import Config, parse_size
from expertd_engine.console import silent
from expertd_engine.core import Forward, StepResult
from expertd_engine.device_experts import foresight_for
from expertd_engine.device_startup import start_on_device
from expertd_engine.errors import UsageError
from expertd_engine.experts.device_listening import Heard
from expertd_engine.experts.device_plans import nothing_known
from expertd_engine.experts.lookahead import Lookahead, NoLookahead
from expertd_engine.model.cuda_runner import nothing_follows
from expertd_engine.sequence_stats import ExpertCounts
from expertd_engine.snapshot import Tiers
from expertd_engine.step_plan import StepPlan

CUDA = torch.device("cuda", 0)


class _StepExperts(Sequence[Sequence[int]]):
    """The distinct experts of each layer of one step, found when they are asked for."""

    def __init__(self, routes: Ids) -> None:
        self._routes = routes

    def __len__(self) -> int:
        return int(self._routes.shape[1])

    def __getitem__(self, layer: Any) -> Any:
        return np.unique(self._routes[:, layer]).tolist()

    def __iter__(self) -> Iterator[Sequence[int]]:
        return (self[layer] for layer in range(len(self)))


class DeviceSession(EngineSession):
    """`EngineSession` on a CUDA device, on generated routes."""

    def __init__(self, spec: EngineSpec, device: torch.device = CUDA) -> None:
        """`device` may be the processor, for Triton's interpreter."""
        if spec.routing == "model":
            raise UsageError("on a device routes are generated: give --routing other than model")
        self._device = device
        self._moved = 0
        """Bytes that had crossed the link after the last step."""
        self._announced: dict[int, Announced] = {}
        """What steps that have begun are routed to, by the plan's number, until the yardstick has it."""
        self._called, self._announcing_s = -1, 0.0
        """The plan asked for last, and the time that it took to announce it, if that was not before."""
        super().__init__(spec)
        self._reported_routes = self._engine.cache.routes
        self._foresight: Lookahead = self._engine.cache.lookahead
        self._at_once = False
        """Whether all routes of a step are known when it begins."""

    def _started(self) -> Any:
        return start_on_device(
            self._store, self._config(), os.getpid(), silent, self._watch, self._device,
            lookahead=self._recorder, routes=self._routes,
        )  # fmt: skip

    def _config(self) -> Config:
        """No more sequences than streams, but for a prompt beside one: each graph is a start-up's second."""
        return replace(config_of(self._spec), max_sequences=max(2, self._spec.streams))

    def retune(self, expert_budget: str, routing: str, hints: str, streams: int) -> None:
        """Go on with this budget, these routes and, at most as many as at start, streams. What is resident stays where
        the budget lets it."""
        spec = self._spec = msgspec.structs.replace(
            self._spec, expert_budget=expert_budget, routing=routing, hints=hints, streams=streams
        )
        routes, channel = generated(spec, self._shape)
        assert routes is not None and self._routes is not None
        self._routes.become(routes)  # the engine holds this one
        cache, index = self._engine.cache, self._store.index
        slots_of = cache.ledger.resident_slots
        foresight = ChannelLookahead(self._routes, channel, slots_of) if channel else NoLookahead()
        self._at_once = channel is not None and channel.at_once
        self._foresight = foresight_for(index, foresight, cache.ledger)
        self.foresee(True)
        cache.set_budget(parse_size(expert_budget, share_allowed=True).resolve(cache.ledger.max_budget_bytes))
        cache.fill()
        self._yardstick = Yardstick(self._store, self._shape, cache.ledger.budget_bytes, ages=True)

    def foresee(self, on: bool) -> None:
        cache = self._engine.cache
        cache.lookahead = self._foresight if on else NoLookahead()
        cache.foreknown = nothing_known
        if self._routes is not None and self._at_once and on:
            cache.foreknown = self._routes.step_numbers
        cache.routes = self._layer_routes if self._foresight.exactness != "none" and on else self._reported_routes

    def _layer_routes(self) -> Heard:
        """What the layers of the step that begins route to: foresight is told of each when it has routed."""
        assert self._routes is not None
        announced = self._routes.announced
        return lambda layer: announced.experts()[layer]

    def _watch(self, runner: Any) -> Forward:
        """As `EngineSession._watch`. What the bench takes while the device goes on is part of what it measures: only
        where the device stands still meanwhile is that time taken off."""
        runner.beginning = self._announce

        def forward(plan: StepPlan) -> StepResult:
            self._called, self._announcing_s, before = plan.step, 0.0, runner.steps_ahead
            result: StepResult = runner(plan)
            ended = time.perf_counter()
            self._counts += self._met(result)
            if plan.phase == "decode":
                self._yardstick.add(self._step_experts(plan))
            self._announced = {step: one for step, one in self._announced.items() if step > plan.step}
            if runner.steps_ahead == before:
                self._streams.own_s += time.perf_counter() - ended
            self._streams.own_s += self._announcing_s
            return result

        return forward

    def _announce(self, plan: StepPlan) -> None:
        began = time.perf_counter()
        super()._announce(plan)
        assert self._routes is not None
        self._announced[plan.step] = self._routes.announced
        if plan.step == self._called:
            self._announcing_s = time.perf_counter() - began

    def steps(self, arms: Iterable[bool], streams: int) -> list[Decoded]:
        """As `EngineSession.steps`. None of these is launched behind another, or it would begin in the other's arm."""
        runner = self._engine.runner
        ahead, runner.look_ahead = runner.look_ahead, nothing_follows
        try:
            if runner.is_ahead:
                self._streams.step()
            return super().steps(arms, streams)
        finally:
            runner.look_ahead = ahead

    def tiers(self) -> Tiers:
        """What crossed the link, and who computes misses."""
        return cast(Tiers, self._engine.cache.tiers())

    def vram_bytes(self) -> int:
        """What this process occupies of the card, at most so far."""
        return int(self._engine.meter.measure().peak_bytes)

    def _met(self, result: StepResult) -> ExpertCounts:
        link = self._engine.cache.link
        total = link.landed + link.read + link.prefetched + link.staged
        moved, self._moved = total - self._moved, total
        return replace(result.experts, loaded_bytes=moved)

    def _step_experts(self, plan: StepPlan) -> Sequence[Sequence[int]]:
        return _StepExperts(self._announced[plan.step].routes)

    def _load_all(self) -> None:
        """Where the budget holds every expert, see that every one is on the card."""
        cache = self._engine.cache
        if cache.ledger.budget_bytes >= self._store.index.expert_bytes_total():
            cache.fill()

    def describe(self) -> EngineFacts:
        facts, info = super().describe(), self._engine.info
        return msgspec.structs.replace(facts, device=f"{info.device}, {info.step_path}")
