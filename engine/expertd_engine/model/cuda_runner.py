"""The engine's `Forward` on a device: planned steps through the device model, and their tokens. Decides nothing.

A step of few rows nears its end; what comes next is known but for its tokens, which lie on the device already: then it
is launched behind, before the host has seen them. So the device goes on while the host takes in what a step brought.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from expertd_engine.core import StepFailed, StepResult, announce_to_nobody
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.leases import ExpertUnavailableError
from expertd_engine.messages import TokenLogprob
from expertd_engine.model.cuda_model import DeviceModel, Running, StepOutcome, StepTokens
from expertd_engine.model.cuda_virtual import DeviceVirtual
from expertd_engine.model.moe import MoELayer
from expertd_engine.model.read_out import logit_positions, read_out, sample_row
from expertd_engine.model.sampler import Draw, SampleRow, needs_no_logits, plain_draw, sample, takes_the_best
from expertd_engine.model.step_routes import RouteSource
from expertd_engine.model.step_rows import Span
from expertd_engine.sequence_stats import Substitutions
from expertd_engine.step_plan import StepPlan

LookAhead = Callable[[StepPlan], StepPlan | None]


def nothing_follows(plan: StepPlan) -> StepPlan | None:
    """A `LookAhead` that launches nothing behind anything."""
    return None


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step of few rows that is under way."""

    plan: StepPlan
    tokens: StepTokens
    running: Running

    def last_rows(self) -> dict[int, int]:
        """By sequence, the row that brings its token."""
        ends = accumulate(chunk.num_tokens for chunk in self.plan.chunks)
        return {chunk.sequence.sequence_id: end - 1 for chunk, end in zip(self.plan.chunks, ends, strict=True)}


class DeviceRunner:
    """Owns the connections between model and expert cache, and the step that was launched behind the last."""

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
        self.look_ahead: LookAhead = nothing_follows
        """`Scheduler.look_ahead`: what follows a step, to be launched behind it."""
        self.beginning: Callable[[StepPlan], None] = announce_to_nobody
        """Told of each plan before its routes are asked for: it may begin before it is called for."""
        self.steps_ahead = self.steps_in_vain = 0
        """Steps that were launched behind another; of these, those that nobody wanted when they had ended."""
        self._cache = cache
        self._routes = routes
        self._ahead: _Launched | None = None
        self._ended_s = 0.0
        """When the last step had ended."""

    def __call__(self, plan: StepPlan) -> StepResult:
        called = time.perf_counter()
        launched = self._taken(plan)
        began = self._ended_s if launched else called
        try:
            if launched is None:
                tokens = self._begin(plan)
                if self.model.is_small(tokens, self._cache):
                    launched = self._launch(plan, tokens)
                else:
                    outcome = self.model.step(tokens, self._cache)
            if launched is not None:
                outcome = self._finished(launched, plan)
        except (ExpertUnavailableError, MemoryError, torch.OutOfMemoryError) as error:
            self._abandon()
            raise StepFailed((), str(error) or "the device has no memory left for this step") from error
        experts = self._cache.end_step()
        ran = plan if launched is None else launched.plan
        substitutions = self._end_mode(ran, outcome)
        places = None if ran is plan else _places(plan, ran)
        sampled, prompt_logprobs = read_out(plan, _OutcomeLogits(outcome, places))
        self._ended_s = time.perf_counter()
        self._cache.end_timed(self._ended_s - began, experts.misses)
        return StepResult(sampled, self._ended_s - called, prompt_logprobs, experts, substitutions)

    def idle(self) -> None:
        """There is no step to compute: take in what has been copied."""
        self._drop()
        self._cache.pump()
        if self.virtual is not None:
            self.virtual.held.finish()
            self.virtual.held.pump()

    @property
    def is_ahead(self) -> bool:
        """Whether a step is under way that nobody has asked for yet."""
        return self._ahead is not None

    def settle(self) -> None:
        """What was launched ahead has ended; it may still be asked for. Call it before memory is taken away."""
        if self._ahead is not None:
            self._ahead.running.ended.wait()

    # ------------------------------------------------------------ steps

    def _begin(self, plan: StepPlan, behind: _Launched | None = None) -> StepTokens:
        """What the step is told, once its experts have been asked about. `behind` another, it waits for nothing."""
        self.beginning(plan)
        tokens = self._tokens(plan, self._limits(plan), behind)
        is_timed = plan.phase == "decode" and plan.mode == "exact"
        self._cache.begin_timed(len(tokens.ids) if is_timed else None, ahead=behind is not None)
        known = plan.mode == "exact" and behind is None  # virtual mode does without the model's own experts
        self._cache.begin_step(tokens.ids if known else (), scan=all(chunk.is_prefill for chunk in plan.chunks))
        return tokens

    def _launch(self, plan: StepPlan, tokens: StepTokens) -> _Launched:
        return _Launched(plan, tokens, self.model.begin(tokens, self._cache))

    def _finished(self, launched: _Launched, plan: StepPlan) -> StepOutcome:
        """Wait for the step, of which the plan is what is left. The next one is launched before it has ended, or at
        least before it is looked at."""
        may_follow = self._may_go_on(launched)

        def meanwhile() -> None:
            nonlocal may_follow
            self._cache.poll()
            if may_follow and self._cache.nears_end:
                may_follow = False
                self._go_on(launched, plan)

        self.model.wait(launched.running, meanwhile)
        if may_follow:
            self._go_on(launched, plan)
        return self.model.outcome(launched.running)

    def _may_go_on(self, launched: _Launched) -> bool:
        """Whether the step after this one needs nothing of what the host is still to see of it."""
        if not self._cache.may_go_ahead or launched.tokens.read:
            return False
        if launched.plan.mode == "virtual" and launched.tokens.limits is None:
            return False  # the budget is too small for that mode, until it may not be
        sequences = [chunk.sequence for chunk in launched.plan.chunks]
        return all(one.constrainer is None and needs_no_logits(sample_row(one, unseen=1)) for one in sequences)

    def _go_on(self, launched: _Launched, plan: StepPlan) -> None:
        """Launch what follows the plan, if that is known by now."""
        if plan.mode == "virtual" and self.virtual is not None and not self.virtual.held.may_go_ahead:
            return
        if (following := self.look_ahead(plan)) is not None:
            self._ahead = self._launch(following, self._begin(following, behind=launched))
            self.steps_ahead += 1
            self._cache.lead.launched(late=launched.running.ended.done())

    def _taken(self, plan: StepPlan) -> _Launched | None:
        """The plan's step, if it is under way already."""
        if self._ahead is not None and self._ahead.plan.step != plan.step:
            self._drop()
        ahead, self._ahead = self._ahead, None
        return ahead

    def _drop(self) -> None:
        """What was launched ahead is nobody's any more. It ran all the same: what it met is told."""
        if (ahead := self._ahead) is None:
            return
        self._ahead = None
        self.steps_in_vain += 1
        self.model.wait(ahead.running, self._cache.poll)
        met = self._cache.end_step()
        self._cache.end_timed(None, met.misses)

    def _abandon(self) -> None:
        self._ahead = None
        self._cache.abandon_step()

    def _limits(self, plan: StepPlan) -> list[float] | None:
        """Of each row of a virtual step; None in exact mode, and where the budget is too small for the other. Raises
        ExpertUnavailableError."""
        if self.virtual is None or plan.mode == "exact" or not self.virtual.held.begin_step():
            return None
        return [chunk.sequence.max_substituted_mass for chunk in plan.chunks for _ in range(chunk.num_tokens)]

    def _end_mode(self, plan: StepPlan, outcome: StepOutcome) -> dict[int, Substitutions]:
        """What virtual mode did to each sequence."""
        if self.virtual is None:
            return {}
        if plan.mode == "exact":
            self.virtual.held.exact_step()
        if outcome.told is None:
            return {}
        met = self.virtual.end_step(outcome.told, [chunk.num_tokens for chunk in plan.chunks])
        return {chunk.sequence.sequence_id: one for chunk, one in zip(plan.chunks, met, strict=True)}

    def _tokens(self, plan: StepPlan, limits: list[float] | None, behind: _Launched | None) -> StepTokens:
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        rows: list[int] = []
        read: list[int] = []
        draws: dict[int, Draw] = {}
        unseen = behind.last_rows() if behind else {}
        for chunk in plan.chunks:
            sequence = chunk.sequence
            spans.append(Span(len(ids), chunk.start, chunk.num_tokens, sequence.block_table))
            read += range(len(rows), len(rows) + len(chunk.prompt_logprob_positions))
            rows += [len(ids) + position - chunk.start for position in logit_positions(chunk)]
            if chunk.samples:
                how = None if sequence.constrainer is not None else sample_row(sequence, unseen=int(bool(unseen)))
                if how is not None and (draw := plain_draw(how)) is not None:
                    draws[rows[-1]] = draw
                elif how is None or not takes_the_best(how):
                    read.append(len(rows) - 1)
            ids += [-1 - unseen[sequence.sequence_id]] if unseen else sequence.tokens(chunk.start, chunk.stop)
            positions += range(chunk.start, chunk.stop)
        routes = None if self._routes is None else self._routes.step_routes(len(ids))
        return StepTokens(ids, positions, spans, rows, frozenset(read), routes, limits, draws)


@dataclass(frozen=True, slots=True)
class _OutcomeLogits:
    """`read_out.StepLogits` of a device's step."""

    outcome: StepOutcome
    places: Sequence[int] | None
    """Where each row asked for stands among the step's own; None: they are these."""

    def of(self, row: int) -> Tensor:
        return self.outcome.logits[self._place(row)]

    def choose(self, row: int, how: SampleRow) -> tuple[int, TokenLogprob | None]:
        place = self._place(row)
        if place in self.outcome.logits:
            return sample(self.outcome.logits[place], how)
        return self.outcome.tokens[place], None

    def _place(self, row: int) -> int:
        return row if self.places is None else self.places[row]


def _places(plan: StepPlan, launched: StepPlan) -> list[int]:
    """Of each row of a step that decodes, where it stands in the one that was launched ahead for it and others."""
    place_of = {chunk.sequence.sequence_id: place for place, chunk in enumerate(launched.chunks)}
    return [place_of[chunk.sequence.sequence_id] for chunk in plan.chunks]
