"""What a step's logits come to: each sequence's next token, and the log-probabilities of prompt tokens."""

from __future__ import annotations

from typing import Protocol

import torch

from expertd_engine.core import SampledToken, StepFailed
from expertd_engine.messages import TokenLogprob
from expertd_engine.model.numerics import one_thread
from expertd_engine.model.sampler import NoTokenLeft, SampleRow, sample, token_logprob
from expertd_engine.request import ConstraintFailed, Sequence
from expertd_engine.step_plan import Chunk, StepPlan


def logit_positions(chunk: Chunk) -> list[int]:
    """Positions whose logits are read: those that score prompt tokens, then the one that chooses the next token."""
    return [*chunk.prompt_logprob_positions, *([chunk.stop - 1] if chunk.samples else [])]


class StepLogits(Protocol):
    """What a step's rows ended in, in the order of `logit_positions` over all chunks."""

    def of(self, row: int) -> torch.Tensor:
        """float32 `[V]`"""
        ...

    def choose(self, row: int, how: SampleRow) -> tuple[int, TokenLogprob | None]:
        """The next token, as `sampler.sample` has it."""
        ...


class TensorLogits:
    """All of a step's logits `[rows, V]` at hand."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def of(self, row: int) -> torch.Tensor:
        return self._logits[row]

    def choose(self, row: int, how: SampleRow) -> tuple[int, TokenLogprob | None]:
        return sample(self._logits[row], how)


@one_thread()
def read_out(plan: StepPlan, logits: StepLogits) -> tuple[dict[int, SampledToken], dict[int, list[TokenLogprob]]]:
    """Each sequence's next token, and the log-probabilities of prompt tokens. Raises StepFailed."""
    sampled: dict[int, SampledToken] = {}
    scored: dict[int, list[TokenLogprob]] = {}
    row = 0
    for chunk in plan.chunks:
        sequence = chunk.sequence
        for position in chunk.prompt_logprob_positions:
            token_id = sequence.prompt_token_ids[position + 1]
            num_top = sequence.sampling.prompt_logprobs or 0
            scored.setdefault(sequence.sequence_id, []).append(token_logprob(logits.of(row), token_id, num_top))
            row += 1
        if chunk.samples:
            try:
                sampled[sequence.sequence_id] = SampledToken(*logits.choose(row, sample_row(sequence)))
            except (NoTokenLeft, ConstraintFailed) as error:
                raise StepFailed([sequence.sequence_id], str(error), refused=True) from None
            row += 1
    return sampled, scored


def sample_row(sequence: Sequence, unseen: int = 0) -> SampleRow:
    """What decides the sequence's next token besides its logits, or the one after so many that are not known yet, where
    that does not depend on them."""
    return SampleRow(
        sequence.sampling,
        sequence.choice_index,
        sequence.prompt_token_ids,
        sequence.output_token_ids,
        sequence.banned_until_min(),
        None if sequence.constrainer is None else sequence.constrainer.allowed(),
        unseen,
    )
