"""A step before it runs: what it may hold, and what it holds. The scheduler makes it; the runner computes it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expertd_engine.messages import ExpertMode
from expertd_engine.request import Sequence

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of steps and sequences. Raises ValueError for one below 1."""

    max_sequences: int
    """Rows in one step."""
    max_step_tokens: int
    """Tokens in one step, of all rows together."""
    max_model_len: int
    """Tokens of prompt and output together."""
    ageing_steps: int = 256
    """Steps of waiting that outweigh one unit of priority."""
    max_scored_tokens: int = 64
    """Prompt tokens whose log-probabilities one step computes: each needs a row of logits, a vocabulary long."""
    max_mode_steps: int = 8
    """Steps in a row of one mode while sequences of the other wait."""
    patience_steps: int = 32
    """Steps in a row that `expert-aware` passes a running sequence over before it goes first."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    @property
    def max_rows(self) -> int:
        """Sequences in one step: no more than tokens."""
        return min(self.max_sequences, self.max_step_tokens)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions `start` to `stop` (exclusive) of one sequence; its block table covers them."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    """The last position's logits choose the next token."""

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_prefill(self) -> bool:
        return self.start < self.sequence.prefill_end

    @property
    def prompt_logprob_positions(self) -> range:
        """Positions of this chunk whose logits score the prompt token after them; empty unless asked for."""
        return self.sequence.unscored(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: its rows, all of one mode and at most one for each sequence, and who had to give way for it."""

    step: int
    """Counts from 0."""
    mode: ExpertMode
    chunks: tuple[Chunk, ...]
    preempted: tuple[Sequence, ...]
    queue: tuple[Sequence, ...] = ()
    """All live sequences, in the plan or not: running ones by rank, then waiting ones by rank."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def phase(self) -> Phase:
        return "prefill" if any(chunk.is_prefill for chunk in self.chunks) else "decode"
