"""The engine core: what a step is, when a sequence ends, and what is told about it. Pure: time comes in as arguments.

Owns the scheduler; the forward pass is behind `Forward`. Every sequence submitted gets exactly one `Finished`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from expertd_engine.messages import Constraint, Finished, FinishReason, Output, Steps, Submit, TokenLogprob
from expertd_engine.request import Constrainer, ConstraintFailed, Sequence
from expertd_engine.scheduler import Scheduler, SequenceRefused
from expertd_engine.sequence_stats import ExpertCounts, Substitutions
from expertd_engine.step_plan import Chunk, StepPlan


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What one sequence's next token is."""

    token_id: int
    logprob: TokenLogprob | None = None
    """Where `sampling.logprobs` asked for it."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a forward pass brought. All mappings are by sequence id."""

    sampled: Mapping[int, SampledToken]
    """One for every chunk that samples."""
    duration_s: float
    prompt_logprobs: Mapping[int, list[TokenLogprob]] = field(default_factory=dict)
    """For every chunk with `prompt_logprob_positions`: the entry of the token after each of them, in order."""
    experts: ExpertCounts = field(default_factory=ExpertCounts)
    substitutions: Mapping[int, Substitutions] = field(default_factory=dict)
    """For every sequence of a virtual step."""


class StepFailed(Exception):
    """The forward pass was given up because of these sequences; the others can be tried again as they are.

    None named: by nobody in particular (a read or an allocation failed), so all may be tried again.
    """

    def __init__(self, sequence_ids: Collection[int], reason: str, *, refused: bool = False) -> None:
        """`refused`: what these sequences ask for cannot be; otherwise it is not their fault."""
        self.sequence_ids = frozenset(sequence_ids)
        self.reason = reason
        self.refused = refused
        super().__init__(f"sequences {sorted(self.sequence_ids)}: {reason}")


class Forward(Protocol):
    """Computes a plan. Raises StepFailed; anything else it raises ends the engine."""

    def __call__(self, plan: StepPlan) -> StepResult: ...


def announce_to_nobody(plan: StepPlan) -> None:
    """For forward passes that nobody has to hear of before they begin."""


@dataclass(frozen=True, slots=True)
class End:
    """Why a sequence ends. `stop_token_id` is set where one of `sampling.stop_token_ids` ended it, not for eos."""

    reason: FinishReason
    stop_token_id: int | None = None
    constraint_met: bool = False


Constrain = Callable[[Constraint], Constrainer]
"""Raises ConstraintFailed; what takes long may fail in the constrainer's first `allowed` instead."""


def no_constraints(constraint: Constraint) -> Constrainer:
    """For engines that cannot constrain."""
    raise ConstraintFailed(f"this engine cannot hold an answer to a {constraint.kind}")


class Foresee(Protocol):
    """Works out which experts the known tokens of these live sequences will use, where that can be known."""

    def __call__(self, sequences: Collection[Sequence]) -> None: ...


def foresee_nothing(sequences: Collection[Sequence]) -> None:
    """For models whose routers read hidden states."""


NO_SUBSTITUTIONS = Substitutions()


def never_refused() -> str | None:
    """Both modes may be asked for at any time."""
    return None


class EngineCore:
    """Called by one thread, between steps. All times are seconds of one monotonic clock, the caller's."""

    def __init__(
        self,
        scheduler: Scheduler,
        forward: Forward,
        eos_token_ids: Iterable[int],
        constrain: Constrain = no_constraints,
        virtual_refusal: Callable[[], str | None] = never_refused,
        foresee: Foresee = foresee_nothing,
    ) -> None:
        """`virtual_refusal`: why a sequence of virtual mode cannot be taken now; None if it can. `foresee` is called
        with each sequence that is taken, and with those that have a new token as soon as they have it."""
        self.scheduler = scheduler
        self._foresee = foresee
        self._virtual_refusal = virtual_refusal
        self._forward = forward
        self._constrain = constrain
        self._eos_token_ids = frozenset(eos_token_ids)
        self._outputs: list[Output] = []
        self._finished: list[Finished] = []
        self._started: list[int] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or to tell."""
        return self.scheduler.has_sequences or bool(self._finished)

    def submit(self, message: Submit, now_s: float) -> None:
        """Take a sequence. One that can never run is answered with `error` by the next step."""
        max_model_len = self.scheduler.limits.max_model_len
        sequence = Sequence.from_submit(
            message, eos_token_ids=self._eos_token_ids, max_model_len=max_model_len, now_s=now_s
        )
        try:
            if message.sampling.constraint is not None:
                sequence.constrainer = self._constrain(message.sampling.constraint)
            if message.mode == "virtual" and (reason := self._virtual_refusal()) is not None:
                raise SequenceRefused(reason)
            self.scheduler.add(sequence)
            self._foresee([sequence])
        except (ConstraintFailed, SequenceRefused) as refusal:
            sequence.finish("error")
            self._tell_finished(sequence, now_s, error=str(refusal), refused=True)

    def abort(self, sequence_ids: Iterable[int], now_s: float) -> None:
        """End these now; ids that are not live are ignored. Told by the next step."""
        for sequence_id in sequence_ids:
            sequence = self.scheduler.abort(sequence_id)
            if sequence is not None:
                self._tell_finished(sequence, now_s)

    def end_all(self, now_s: float) -> Steps:
        """The engine stops: abort whatever lives, and tell all that has not been told."""
        self.abort(list(self.scheduler.live), now_s)
        return self._take_told()

    def step(self, now_s: float) -> Steps:
        """Form, compute and apply one step that begins at `now_s`; tells all that has happened since the last.

        An end-of-sequence or stop token is the last entry of its `Output.token_ids`: the server keeps it out of the
        text.
        """
        plan = self.scheduler.schedule()
        if plan is not None:
            for chunk in plan.chunks:
                if chunk.sequence.stats.mark_scheduled(now_s):
                    self._started.append(chunk.sequence.sequence_id)
            try:
                result = self._forward(plan)
            except StepFailed as failure:
                self._apply_failure(plan, failure, now_s)
            else:
                self._apply(plan, result, now_s + result.duration_s)
        if not self.scheduler.has_sequences:
            self.scheduler.check()
        return self._take_told()

    def _apply(self, plan: StepPlan, result: StepResult, now_s: float) -> None:
        token_ids = {sequence_id: sampled.token_id for sequence_id, sampled in result.sampled.items()}
        grown: list[Sequence] = []
        for chunk in self.scheduler.update_from_output(plan, token_ids):
            sequence = chunk.sequence
            sequence.stats.experts += result.experts
            sequence.stats.substitutions += result.substitutions.get(sequence.sequence_id, NO_SUBSTITUTIONS)
            if chunk.samples:
                sequence.stats.mark_token(now_s)
            self._tell_output(chunk, result)
            end = find_end(sequence)
            if end is not None:
                self.scheduler.finish(sequence, end.reason)
                self._tell_finished(sequence, now_s, end)
            elif chunk.samples:
                grown.append(sequence)
        if grown:
            self._foresee(grown)

    def _apply_failure(self, plan: StepPlan, failure: StepFailed, now_s: float) -> None:
        scheduler, blamed = self.scheduler, failure.sequence_ids
        for sequence in scheduler.step_failed(plan, blamed) if blamed else scheduler.step_gave_up(plan):
            self._tell_finished(sequence, now_s, error=failure.reason, refused=failure.refused)

    def _tell_output(self, chunk: Chunk, result: StepResult) -> None:
        sequence_id = chunk.sequence.sequence_id
        chunk.sequence.add_prompt_logprobs(result.prompt_logprobs.get(sequence_id, ()))
        prompt_logprobs = chunk.sequence.take_prompt_logprobs()
        if chunk.samples:
            sampled = result.sampled[sequence_id]
            logprobs = None if sampled.logprob is None else [sampled.logprob]
            is_first = len(chunk.sequence.output_token_ids) == 1
            cached_tokens = chunk.sequence.stats.cached_tokens if is_first else 0
            self._outputs.append(Output(sequence_id, [sampled.token_id], logprobs, prompt_logprobs, cached_tokens))
        elif prompt_logprobs is not None:
            self._outputs.append(Output(sequence_id, [], None, prompt_logprobs))

    def _tell_finished(
        self, sequence: Sequence, now_s: float, end: End | None = None, *, error: str | None = None,
        refused: bool = False,
    ) -> None:  # fmt: skip
        assert sequence.finish_reason is not None
        self._finished.append(
            Finished(
                sequence.sequence_id,
                sequence.finish_reason,
                stop_token_id=end.stop_token_id if end is not None else None,
                error=error,
                refused=refused,
                constraint_met=end is not None and end.constraint_met,
                stats=sequence.stats.result(now_s),
            )
        )

    def _take_told(self) -> Steps:
        told = Steps(self._outputs, self._finished, self._started)
        self._outputs, self._finished, self._started = [], [], []
        return told


def find_end(sequence: Sequence) -> End | None:
    """Whether a sequence ends after the step just applied to it.

    No token ends it before `min_tokens`: the sampler masks those (`Sequence.banned_until_min`). A sequence that has no
    room for output ends once its prompt is computed.
    """
    outputs = sequence.output_token_ids
    if outputs and outputs[-1] in sequence.eos_token_ids:
        return End("stop")
    if outputs and outputs[-1] in sequence.sampling.stop_token_ids:
        return End("stop", outputs[-1])
    if sequence.constrainer is not None and sequence.constrainer.is_finished:
        return End("stop", constraint_met=True)
    is_full = sequence.num_tokens >= sequence.max_length
    return End("length") if is_full and (outputs or not sequence.num_uncomputed_tokens) else None
