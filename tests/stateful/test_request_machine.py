"""One sequence's life against a naive twin: a list of tokens, a number, a word. Illegal calls must change nothing."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertd_engine.errors import EngineError
from expertd_engine.messages import FinishReason, TokenLogprob
from expertd_engine.request import SequenceState
from support.builders_core import make_sequence


class SequenceMachine(RuleBasedStateMachine):
    """Every rule may be tried at any time; the twin says whether it is legal."""

    @initialize(
        prompt=st.lists(st.integers(0, 49), min_size=1, max_size=8), max_tokens=st.integers(0, 4), scored=st.booleans()
    )
    def begin(self, prompt: list[int], max_tokens: int, scored: bool) -> None:
        self.sequence = make_sequence(1, prompt, max_tokens=max_tokens, prompt_logprobs=0 if scored else None)
        self.prompt, self.room = prompt, max_tokens
        self.outputs: list[int] = []
        self.computed = 0
        self.word = "waiting"
        self.blocks: list[int] = []
        self.preemptions = 0
        self.reasons: list[FinishReason] = []
        self.entries: list[int] | None = [] if scored else None
        self.handed_over: list[list[TokenLogprob | None]] = []

    def known(self) -> list[int]:
        return self.prompt + self.outputs

    @rule(blocks=st.lists(st.integers(1, 9), max_size=3))
    def admit(self, blocks: list[int]) -> None:
        if self.word not in ("waiting", "preempted"):
            with pytest.raises(EngineError):
                self.sequence.admit(list(blocks))
            return
        self.sequence.admit(list(blocks))
        self.word, self.blocks = "running", blocks

    @rule()
    def preempt(self) -> None:
        if self.word != "running":
            with pytest.raises(EngineError):
                self.sequence.preempt()
            return
        assert self.sequence.preempt() == self.blocks
        self.word, self.blocks, self.computed = "preempted", [], 0
        self.preemptions += 1
        assert self.sequence.prefill_end == len(self.known())

    @precondition(lambda self: self.word == "running" and self.computed)
    @rule()
    def lose_its_blocks_and_return(self) -> None:
        """Of its own parts, but otherwise rare."""
        self.preempt()
        self.admit([1])
        self.advance(1)

    @rule(reason=st.sampled_from(["stop", "length", "abort", "error"]), patience=st.integers(0, 7))
    def finish(self, reason: FinishReason, patience: int) -> None:
        """Seldom, so that there is a life to end."""
        if patience:
            return
        if self.word == "finished":
            with pytest.raises(EngineError):
                self.sequence.finish(reason)
            return
        assert self.sequence.finish(reason) == self.blocks
        self.word, self.blocks = "finished", []
        self.reasons.append(reason)

    @rule(count=st.integers(1, 3) | st.integers(0, 7))
    def advance(self, count: int) -> None:
        if self.word != "running" or not 0 < count <= len(self.known()) - self.computed:
            with pytest.raises(EngineError):
                self.sequence.advance(count)
            return
        self.score(count)
        self.sequence.advance(count)
        self.computed += count

    def score(self, count: int) -> None:
        """Each prompt token but the first is scored once, by the position before it, however often it is computed."""
        start, stop = self.computed, self.computed + count
        expected = []
        if self.entries is not None:
            expected = [p for p in range(start, stop) if p + 1 < len(self.prompt) and p >= len(self.entries)]
            self.entries += expected
        assert list(self.sequence.unscored(start, stop)) == expected
        self.sequence.add_prompt_logprobs(TokenLogprob(self.prompt[p + 1], 0.0, []) for p in expected)
        taken = self.sequence.take_prompt_logprobs()
        self.handed_over += [] if taken is None else [taken]

    @rule(token_id=st.integers(0, 49))
    def append(self, token_id: int) -> None:
        legal = self.word == "running" and self.computed == len(self.known()) and len(self.outputs) < self.room
        if not legal:
            with pytest.raises(EngineError):
                self.sequence.append(token_id)
            return
        self.sequence.append(token_id)
        self.outputs.append(token_id)

    @invariant()
    def agrees_with_its_twin(self) -> None:
        sequence = self.sequence
        assert sequence.state is SequenceState(self.word)
        assert sequence.tokens(0, sequence.num_tokens) == self.known()
        assert sequence.num_computed_tokens == self.computed
        assert sequence.block_table == self.blocks
        assert sequence.stats.preemptions == self.preemptions
        assert sequence.finish_reason == (self.reasons[0] if self.reasons else None)

    @invariant()
    def prompt_logprobs_are_whole_and_told_once(self) -> None:
        whole = [[None, *(TokenLogprob(token_id, 0.0, []) for token_id in self.prompt[1:])]]
        assert self.handed_over in ([], whole)


TestSequence = SequenceMachine.TestCase
TestSequence.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
