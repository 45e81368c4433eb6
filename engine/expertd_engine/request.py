"""One sequence and its life: known tokens, computed tokens, KV blocks and state.

The engine thread owns every sequence; the scheduler alone moves its state, the core alone reports it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from expertd_engine.errors import EngineError
from expertd_engine.messages import ExpertMode, FinishReason, Sampling, Submit, TokenLogprob
from expertd_engine.paths import Paths
from expertd_engine.sequence_stats import StatsCollector


class SequenceState(Enum):
    """Aborted and failed are reasons of `FINISHED`, not states."""

    WAITING = "waiting"
    RUNNING = "running"
    """Holds a row and KV blocks."""
    PREEMPTED = "preempted"
    """Waits again, without blocks; its known tokens will be computed anew."""
    FINISHED = "finished"


LEGAL_TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.RUNNING: frozenset({SequenceState.PREEMPTED, SequenceState.FINISHED}),
    SequenceState.PREEMPTED: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}


class ConstraintFailed(Exception):
    """A constraint cannot be kept to any longer, or never could: its sequence alone ends with this message."""


class Constrainer(Protocol):
    """What may come next in one sequence with a constraint. Told of every output token, in order and once."""

    def allowed(self) -> bytes:
        """A bit for each token id, lowest first in each byte: whether the token may come next. An end-of-sequence
        token may where what has come meets the constraint. Raises ConstraintFailed."""
        ...

    def accept(self, token_id: int) -> None:
        """A token has come. One that was not allowed makes the next `allowed` fail."""
        ...

    @property
    def is_finished(self) -> bool:
        """What has come meets the constraint, and nothing more may come."""
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """Known tokens (prompt, then output) and how many of them are computed: `num_computed_tokens ≤ num_tokens`.

    `max_length` bounds `num_tokens`; a sequence whose prompt reaches it samples nothing.
    """

    sequence_id: int
    prompt_token_ids: list[int]
    sampling: Sampling
    max_length: int
    eos_token_ids: frozenset[int] = frozenset()
    choice_index: int = 0
    priority: int = 0
    mode: ExpertMode = "exact"
    max_substituted_mass: float = 1.0
    cache_salt: str = ""
    constrainer: Constrainer | None = None
    """Like the outputs, it stays through preemptions."""
    paths: Paths | None = None
    """Experts of its known tokens, where the model's router tells them ahead. They stay through preemptions too."""
    stats: StatsCollector = field(default_factory=StatsCollector)

    rank: tuple[int, int] = (0, 0)
    """Place in the one order of all sequences, lower first; given once, by the scheduler."""
    state: SequenceState = SequenceState.WAITING
    finish_reason: FinishReason | None = None
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    """KV blocks in token order: position p lies in `block_table[p // block_tokens]`. Only `RUNNING` holds any."""
    block_keys: list[bytes] = field(default_factory=list)
    """Keys of its first full blocks, as far as the prefix cache has worked them out; they never change."""
    prefill_end: int = field(init=False)
    """Positions below it are computed as prompt: the prompt's, and after a preemption the outputs' known then."""
    _prompt_logprobs: list[TokenLogprob | None] | None = field(init=False)
    """Entries gathered so far, by prompt position; None: not asked for, or handed over."""

    def __post_init__(self) -> None:
        self.prefill_end = len(self.prompt_token_ids)
        self._prompt_logprobs = None if self.sampling.prompt_logprobs is None else [None]

    @classmethod
    def from_submit(
        cls, message: Submit, *, eos_token_ids: frozenset[int], max_model_len: int, now_s: float
    ) -> Sequence:
        prompt = [token_id for part in message.inputs for token_id in part.token_ids]
        return cls(
            sequence_id=message.sequence_id,
            prompt_token_ids=prompt,
            sampling=message.sampling,
            max_length=min(len(prompt) + message.sampling.max_tokens, max_model_len),
            eos_token_ids=frozenset() if message.sampling.ignore_eos else eos_token_ids,
            choice_index=message.choice_index,
            priority=message.priority,
            mode=message.mode,
            max_substituted_mass=message.max_substituted_mass,
            cache_salt=message.cache_salt,
            stats=StatsCollector(submitted_s=now_s),
        )

    # ------------------------------------------------------------ tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def max_computed_tokens(self) -> int:
        """The most positions that ever need KV: the last sampled token is never computed."""
        return max(self.num_prompt_tokens, self.max_length - 1)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Known token ids at positions `start` to `stop` (exclusive)."""
        prompt = self.num_prompt_tokens
        return self.prompt_token_ids[start:stop] + self.output_token_ids[max(start - prompt, 0) : max(stop - prompt, 0)]

    def banned_until_min(self) -> frozenset[int]:
        """Token ids that the sampler must mask for the next token: those that would end it before `min_tokens`."""
        if len(self.output_token_ids) >= self.sampling.min_tokens:
            return frozenset()
        return self.eos_token_ids.union(self.sampling.stop_token_ids)

    def advance(self, num_tokens: int) -> None:
        """The KV of the next `num_tokens` known tokens is now computed."""
        self._require_running("advance")
        if not 0 < num_tokens <= self.num_uncomputed_tokens:
            raise EngineError(f"{self}: {num_tokens} tokens computed of {self.num_uncomputed_tokens} uncomputed")
        self.num_computed_tokens += num_tokens

    def append(self, token_id: int) -> None:
        """A token sampled from the logits of the last known one."""
        self._require_running("append")
        if self.num_uncomputed_tokens or self.num_tokens >= self.max_length:
            raise EngineError(
                f"{self}: a token at {self.num_tokens} of {self.max_length}, {self.num_computed_tokens} computed"
            )
        self.output_token_ids.append(token_id)
        if self.constrainer is not None:
            self.constrainer.accept(token_id)

    # ------------------------------------------------------------ prompt logprobs

    def unscored(self, start: int, stop: int) -> range:
        """The positions in `start … stop` whose logits score a following prompt token that is still wanted."""
        if self._prompt_logprobs is None:
            return range(0)
        return range(max(start, len(self._prompt_logprobs) - 1), min(stop, self.num_prompt_tokens - 1))

    def add_prompt_logprobs(self, piece: Iterable[TokenLogprob]) -> None:
        """Entries for exactly the positions that `unscored` named for the chunk, in order."""
        if self._prompt_logprobs is not None:
            self._prompt_logprobs.extend(piece)

    def take_prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        """All prompt tokens' entries once they are complete, and only once; None before and after."""
        complete = self._prompt_logprobs
        if complete is None or len(complete) < self.num_prompt_tokens:
            return None
        self._prompt_logprobs = None
        return complete

    # ------------------------------------------------------------ life

    def admit(self, blocks: list[int], num_cached_tokens: int = 0) -> None:
        """Take a row and blocks; the KV of the first `num_cached_tokens` tokens is in them already."""
        self._move(SequenceState.RUNNING)
        self.block_table = blocks
        self.num_computed_tokens = num_cached_tokens
        if not self.stats.preemptions:
            self.stats.cached_tokens = num_cached_tokens

    def preempt(self) -> list[int]:
        """Give up row and blocks (returned, to be freed). Outputs stay and will be computed anew, as prompt."""
        self._move(SequenceState.PREEMPTED)
        self.num_computed_tokens = 0
        self.prefill_end = self.num_tokens
        self.stats.preemptions += 1
        if self.paths is not None:
            self.paths.stored = 0
        return self._take_blocks()

    def finish(self, reason: FinishReason) -> list[int]:
        """End, once. Returns the blocks it held, to be freed."""
        self._move(SequenceState.FINISHED)
        self.finish_reason = reason
        return self._take_blocks()

    def _take_blocks(self) -> list[int]:
        blocks, self.block_table = self.block_table, []
        return blocks

    def _move(self, to: SequenceState) -> None:
        if to not in LEGAL_TRANSITIONS[self.state]:
            raise EngineError(f"{self}: cannot become {to.value}")
        self.state = to

    def _require_running(self, what: str) -> None:
        if self.state is not SequenceState.RUNNING:
            raise EngineError(f"{self}: cannot {what}")

    def __str__(self) -> str:
        return f"sequence {self.sequence_id} ({self.state.value})"
