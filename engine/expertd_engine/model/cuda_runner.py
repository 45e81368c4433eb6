"""The engine's `Forward` on a device: one planned step through the device model, and its tokens. Decides nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd_engine.core import StepFailed, StepResult
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.leases import ExpertUnavailableError
from expertd_engine.messages import TokenLogprob
from expertd_engine.model.cuda_model import DeviceModel, StepOutcome, StepTokens
from expertd_engine.model.cuda_virtual import DeviceVirtual
from expertd_engine.model.moe import MoELayer
from expertd_engine.model.read_out import logit_positions, read_out, sample_row
from expertd_engine.model.sampler import Draw, SampleRow, plain_draw, sample, takes_the_best
from expertd_engine.model.step_routes import RouteSource
from expertd_engine.model.step_rows import Span
from expertd_engine.sequence_stats import Substitutions
from expertd_engine.step_plan import StepPlan


class DeviceRunner:
    """Owns nothing but the connections between model and expert cache."""

    layers: Sequence[MoELayer] = ()
    """Experts run inside the model's own steps."""

    def __init__(
        self, model: DeviceModel, cache: DeviceCache, routes: RouteSource | None = None,
        virtual: DeviceVirtual | None = None,
    ) -> None:  # fmt: skip
        """`routes` choose experts in the routers' place, where the model was made for that. `virtual`: None where there
        is no virtual mode."""
        self.virtual = virtual
        self.model = model
        self._cache = cache
        self._routes = routes

    def __call__(self, plan: StepPlan) -> StepResult:
        began = time.perf_counter()
        try:
            tokens = self._tokens(plan, self._limits(plan))
        except ExpertUnavailableError as error:
            raise StepFailed((), str(error)) from error
        self._cache.begin_timed(len(tokens.ids) if plan.phase == "decode" and plan.mode == "exact" else None)
        foreseen = tokens.ids if plan.mode == "exact" else ()  # virtual mode does without the model's own experts
        self._cache.begin_step(foreseen, scan=all(chunk.is_prefill for chunk in plan.chunks))
        try:
            outcome = self.model.step(tokens, self._cache)
        except (ExpertUnavailableError, MemoryError, torch.OutOfMemoryError) as error:
            self._cache.abandon_step()
            raise StepFailed((), str(error) or "the device has no memory left for this step") from error
        experts = self._cache.end_step()
        substitutions = self._end_mode(plan, tokens)
        sampled, prompt_logprobs = read_out(plan, _OutcomeLogits(outcome))
        duration_s = time.perf_counter() - began
        self._cache.end_timed(duration_s, experts.misses)
        return StepResult(sampled, duration_s, prompt_logprobs, experts, substitutions)

    def idle(self) -> None:
        """There is no step to compute: take in what has been copied."""
        self._cache.pump()
        if self.virtual is not None:
            self.virtual.held.finish()
            self.virtual.held.pump()

    def _limits(self, plan: StepPlan) -> list[float] | None:
        """Of each row of a virtual step; None in exact mode, and where the budget is too small for the other. Raises
        ExpertUnavailableError."""
        if self.virtual is None or plan.mode == "exact" or not self.virtual.held.begin_step():
            return None
        return [chunk.sequence.max_substituted_mass for chunk in plan.chunks for _ in range(chunk.num_tokens)]

    def _end_mode(self, plan: StepPlan, tokens: StepTokens) -> dict[int, Substitutions]:
        """What virtual mode did to each sequence."""
        if self.virtual is None:
            return {}
        if plan.mode == "exact":
            self.virtual.held.exact_step()
        if tokens.limits is None:
            return {}
        met = self.virtual.end_step([chunk.num_tokens for chunk in plan.chunks])
        return {chunk.sequence.sequence_id: one for chunk, one in zip(plan.chunks, met, strict=True)}

    def _tokens(self, plan: StepPlan, limits: list[float] | None) -> StepTokens:
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        rows: list[int] = []
        read: list[int] = []
        draws: dict[int, Draw] = {}
        for chunk in plan.chunks:
            spans.append(Span(len(ids), chunk.start, chunk.num_tokens, chunk.sequence.block_table))
            read += range(len(rows), len(rows) + len(chunk.prompt_logprob_positions))
            rows += [len(ids) + position - chunk.start for position in logit_positions(chunk)]
            if chunk.samples:
                how = None if chunk.sequence.constrainer is not None else sample_row(chunk.sequence)
                if how is not None and (draw := plain_draw(how)) is not None:
                    draws[rows[-1]] = draw
                elif how is None or not takes_the_best(how):
                    read.append(len(rows) - 1)
            ids += chunk.sequence.tokens(chunk.start, chunk.stop)
            positions += range(chunk.start, chunk.stop)
        routes = None if self._routes is None else self._routes.step_routes(len(ids))
        return StepTokens(ids, positions, spans, rows, frozenset(read), routes, limits, draws)


@dataclass(frozen=True, slots=True)
class _OutcomeLogits:
    """`read_out.StepLogits` of a device's step."""

    outcome: StepOutcome

    def of(self, row: int) -> Tensor:
        return self.outcome.logits[row]

    def choose(self, row: int, how: SampleRow) -> tuple[int, TokenLogprob | None]:
        if row in self.outcome.logits:
            return sample(self.outcome.logits[row], how)
        return self.outcome.tokens[row], None
