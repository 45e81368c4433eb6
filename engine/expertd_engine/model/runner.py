"""Runs one planned step: flattens its chunks into one row of tokens, calls the model, reads it out. Decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from expertd_engine.core import StepFailed, StepResult, announce_to_nobody
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.leases import ExpertUnavailableError
from expertd_engine.experts.pregated import PregatedLookahead
from expertd_engine.kernels.library import KernelError
from expertd_engine.model.kv_storage import KVStorage
from expertd_engine.model.moe import MoELayer
from expertd_engine.model.path_routing import PathRouting
from expertd_engine.model.pathfinder import Pathfinder
from expertd_engine.model.read_out import TensorLogits, logit_positions, read_out
from expertd_engine.model.step_model import StepModel
from expertd_engine.model.step_routes import KnownRoutes, RouteSource, StepRoutes, Watch
from expertd_engine.model.step_rows import Span, StepRows
from expertd_engine.model.virtual_routing import VirtualRouting
from expertd_engine.sequence_stats import Substitutions
from expertd_engine.step_plan import StepPlan


class Onlooker(Watch, Protocol):
    """A `Watch` that is told of steps of exact mode, and says which it wants to see."""

    def begin_step(self, streams: Sequence[int], decode: Sequence[bool]) -> bool:
        """A step begins: for each row the id of its sequence, and whether it decodes."""
        ...

    def end_step(self, *, well: bool) -> None:
        """A step that it wanted to see has ended."""
        ...


class Runner:
    """The engine's `Forward`: owns nothing but the connections between model, KV storage and expert cache."""

    def __init__(
        self,
        model: StepModel,
        layers: Sequence[MoELayer],
        storage: KVStorage,
        cache: ExpertCache,
        routes: RouteSource | None = None,
        virtual: VirtualRouting | PathRouting | None = None,
        pathfinder: Pathfinder | None = None,
    ) -> None:
        """`virtual`: None where the model has no virtual mode. `pathfinder`: of a model that routes ahead."""
        self.virtual = virtual
        self.pathfinder = pathfinder
        self.onlookers: Sequence[Onlooker] = ()
        self.model = model
        self.layers = layers
        self._storage = storage
        self._cache = cache
        self.routes = routes
        """Chooses experts in the routers' place, for measurements on generated routes."""
        self.beginning: Callable[[StepPlan], None] = announce_to_nobody
        """Told of each plan before it is computed, for whoever makes those routes."""

    def __call__(self, plan: StepPlan) -> StepResult:
        self.beginning(plan)
        began = time.perf_counter()
        token_ids = [t for chunk in plan.chunks for t in chunk.sequence.tokens(chunk.start, chunk.stop)]
        routes = StepRoutes(len(token_ids), self._cache, decode_rows=_decode_rows(plan), routes=self.routes)
        failure: StepFailed | None = None
        is_virtual = False
        watches: list[Onlooker] = []
        payoff = self._cache.payoff
        if payoff is not None:
            payoff.begin_step(len(token_ids) if plan.phase == "decode" and plan.mode == "exact" else None)
        try:
            self._route_ahead(plan, routes)
            # What a model foresees are its own experts: virtual mode does without those.
            self._cache.begin_step(token_ids if plan.mode == "exact" else ())
            is_virtual = self._begin_mode(plan, token_ids, routes)
            routes.watches = watches = self._begin_watches(plan)
            logits = self._logits(plan, routes, token_ids)
            sampled, prompt_logprobs = read_out(plan, TensorLogits(logits))
        except StepFailed as error:
            failure = error
        except (ExpertUnavailableError, KernelError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            failure = StepFailed((), str(error) or "the box has no memory left for this step")
            failure.__cause__ = error
        substitutions = self._end_mode(plan, is_virtual)
        experts = self._cache.end_step()
        for watch in watches:
            watch.end_step(well=failure is None)
        if failure is not None:
            raise failure
        duration_s = time.perf_counter() - began
        if payoff is not None:
            payoff.end_step(duration_s)
        return StepResult(sampled, duration_s, prompt_logprobs, experts, substitutions)

    def _route_ahead(self, plan: StepPlan, routes: StepRoutes) -> None:
        """Where the model's router has all to say before the step, let it say so."""
        if self.pathfinder is None:
            return
        routes.known = self.pathfinder.for_step(plan)
        self._tell(plan, routes.known if plan.mode == "exact" else None)

    def _tell(self, plan: StepPlan, known: KnownRoutes | None) -> None:
        """Let a lookahead that knows routes have the step's; None: nothing is known yet."""
        lookahead = self._cache.lookahead
        if self.pathfinder is None or not isinstance(lookahead, PregatedLookahead):
            return
        if known is None:
            lookahead.plan((), ())
        else:
            self.pathfinder.tell(lookahead, plan, known)

    def _begin_watches(self, plan: StepPlan) -> list[Onlooker]:
        if not self.onlookers or plan.mode != "exact":
            return []
        rows = [
            (chunk.sequence.sequence_id, not chunk.is_prefill) for chunk in plan.chunks for _ in range(chunk.num_tokens)
        ]
        streams, decode = [stream for stream, _ in rows], [decodes for _, decodes in rows]
        return [onlooker for onlooker in self.onlookers if onlooker.begin_step(streams, decode)]

    def _begin_mode(self, plan: StepPlan, token_ids: Sequence[int], routes: StepRoutes) -> bool:
        """Let others route in the model's place. False in exact mode, and where the budget is too small for that."""
        if self.virtual is None or plan.mode == "exact":
            return False
        limits = [chunk.sequence.max_substituted_mass for chunk in plan.chunks for _ in range(chunk.num_tokens)]
        if isinstance(self.virtual, VirtualRouting):
            begun = self.virtual.begin_step(limits, token_ids)
            routes.reroute = self.virtual if begun else None
            return begun
        assert routes.known is not None, "a model of one index has a router that runs before its steps"
        served = self.virtual.begin_step(limits, routes.known)
        routes.known = served or routes.known
        self._tell(plan, routes.known)
        self._cache.foresee(())
        return served is not None

    def _end_mode(self, plan: StepPlan, is_virtual: bool) -> dict[int, Substitutions]:
        """What virtual mode did to each sequence."""
        if self.virtual is None:
            return {}
        if plan.mode == "exact":
            self.virtual.held.exact_step()
        if not is_virtual:
            return {}
        self.virtual.end_step(len(plan.chunks))
        met, row = {}, 0
        for chunk in plan.chunks:
            met[chunk.sequence.sequence_id] = self.virtual.row_counts(row, row + chunk.num_tokens)
            row += chunk.num_tokens
        return met

    def idle(self) -> None:
        """There is no step to compute: take in what has been loaded."""
        if self.virtual is None:
            self._cache.pump()
        else:
            self.virtual.held.pump()

    def settle(self) -> None:
        """Nothing runs between steps."""

    def _logits(self, plan: StepPlan, routes: StepRoutes, token_ids: list[int]) -> torch.Tensor:
        spans: list[Span] = []
        logit_rows: list[int] = []
        row = 0
        for chunk in plan.chunks:
            spans.append(Span(row, chunk.start, chunk.num_tokens, chunk.sequence.block_table))
            logit_rows += [row + position - chunk.start for position in logit_positions(chunk)]
            row += chunk.num_tokens
        positions = [p for chunk in plan.chunks for p in range(chunk.start, chunk.stop)]
        rows = StepRows(token_ids, positions, spans, logit_rows)
        return self.model.forward(rows, self._storage, self.layers, routes)


def _decode_rows(plan: StepPlan) -> list[int] | None:
    """Rows of the step that are no prompt; None when none is prompt."""
    if plan.phase == "decode":
        return None
    prompt = [chunk.is_prefill for chunk in plan.chunks for _ in range(chunk.num_tokens)]
    return [row for row, is_prompt in enumerate(prompt) if not is_prompt]
