from __future__ import annotations

from typing import Any

import pytest

from expertd_engine.errors import EngineError
from expertd_engine.messages import Sampling, Submit, TextInput, TokenLogprob
from expertd_engine.request import LEGAL_TRANSITIONS, Sequence, SequenceState
from expertd_engine.sequence_stats import StatsCollector
from support.builders_core import EOS, make_sequence


def running(**sampling: Any) -> Sequence:
    sequence = make_sequence(**sampling)
    sequence.admit([1])
    return sequence


def test_every_state_has_its_row_and_only_finished_is_final() -> None:
    assert set(LEGAL_TRANSITIONS) == set(SequenceState)
    assert [state for state, to in LEGAL_TRANSITIONS.items() if not to] == [SequenceState.FINISHED]


def test_ends_once_with_one_reason() -> None:
    sequence = running()
    assert sequence.finish("stop") == [1]
    with pytest.raises(EngineError, match=r"sequence 1 \(finished\): cannot become finished"):
        sequence.finish("abort")
    assert sequence.finish_reason == "stop"


def test_nothing_is_computed_or_appended_unless_running() -> None:
    sequence = make_sequence()
    with pytest.raises(EngineError, match="cannot advance"):
        sequence.advance(1)
    with pytest.raises(EngineError, match="cannot append"):
        sequence.append(9)


def test_a_token_is_appended_only_when_all_known_ones_are_computed() -> None:
    sequence = running()
    sequence.advance(2)
    with pytest.raises(EngineError, match="2 computed"):
        sequence.append(9)
    sequence.advance(1)
    sequence.append(9)
    assert (sequence.num_tokens, sequence.num_uncomputed_tokens) == (4, 1)


@pytest.mark.parametrize("count", [-1, 0, 4])
def test_computes_at_least_one_and_at_most_the_known_tokens(count: int) -> None:
    with pytest.raises(EngineError, match="of 3 uncomputed"):
        running().advance(count)


def test_max_length_is_never_passed() -> None:
    sequence = running(max_tokens=0)
    sequence.advance(3)
    with pytest.raises(EngineError, match="a token at 3 of 3"):
        sequence.append(9)


def test_preemption_gives_the_blocks_back_and_keeps_the_output() -> None:
    sequence = running()
    sequence.advance(3)
    sequence.append(9)
    assert sequence.preempt() == [1]
    assert (sequence.block_table, sequence.num_computed_tokens, sequence.output_token_ids) == ([], 0, [9])
    assert (sequence.prefill_end, sequence.stats.preemptions) == (4, 1)


def test_tokens_cross_the_border_of_prompt_and_output() -> None:
    sequence = make_sequence(prompt=[1, 2, 3])
    sequence.output_token_ids = [4, 5]
    assert [sequence.tokens(i, j) for i, j in [(0, 5), (2, 4), (3, 5), (0, 2), (4, 4)]] == [
        [1, 2, 3, 4, 5], [3, 4], [4, 5], [1, 2], [],
    ]  # fmt: skip


def test_stop_tokens_are_banned_until_min_tokens() -> None:
    sequence = make_sequence(min_tokens=1, stop_token_ids=[8])
    assert sequence.banned_until_min() == {EOS, 8}
    sequence.output_token_ids = [9]
    assert sequence.banned_until_min() == frozenset()


def test_an_ignored_eos_is_not_banned() -> None:
    assert make_sequence(min_tokens=1, ignore_eos=True).banned_until_min() == frozenset()


def test_inputs_are_joined_and_length_is_bounded_by_the_context() -> None:
    message = Submit(1, [TextInput([1, 2]), TextInput([3])], Sampling(max_tokens=50))
    sequence = Sequence.from_submit(message, eos_token_ids=frozenset(), max_model_len=10, now_s=0.0)
    assert (sequence.prompt_token_ids, sequence.max_length, sequence.max_computed_tokens) == ([1, 2, 3], 10, 9)


def entries(*token_ids: int) -> list[TokenLogprob]:
    return [TokenLogprob(token_id, -1.0, []) for token_id in token_ids]


def test_prompt_logprobs_are_assembled_over_chunks_and_handed_over_once() -> None:
    sequence = make_sequence(prompt=[4, 5, 6, 7], prompt_logprobs=0)
    assert sequence.unscored(0, 2) == range(0, 2)
    sequence.add_prompt_logprobs(entries(5, 6))
    assert sequence.take_prompt_logprobs() is None
    assert sequence.unscored(2, 4) == range(2, 3)  # the last position's logits score no prompt token
    sequence.add_prompt_logprobs(entries(7))
    assert sequence.take_prompt_logprobs() == [None, *entries(5, 6, 7)]
    assert sequence.take_prompt_logprobs() is None
    assert not sequence.unscored(0, 4)


def test_what_was_scored_before_a_preemption_is_not_scored_again() -> None:
    sequence = make_sequence(prompt=[4, 5, 6, 7], prompt_logprobs=0)
    sequence.add_prompt_logprobs(entries(5, 6))
    assert sequence.unscored(0, 4) == range(2, 3)
    assert not sequence.unscored(0, 1)


def test_a_prompt_of_one_token_has_one_empty_entry() -> None:
    sequence = make_sequence(prompt=[4], prompt_logprobs=0)
    assert not sequence.unscored(0, 1)
    assert sequence.take_prompt_logprobs() == [None]


def test_times_add_up_to_the_whole_life() -> None:
    stats = StatsCollector(submitted_s=1.0)
    for now_s in (3.0, 4.0):
        stats.mark_scheduled(now_s)
    for now_s in (6.0, 7.0):
        stats.mark_token(now_s)
    result = stats.result(10.0)
    assert (result.queue_s, result.prefill_s, result.decode_s) == (2.0, 3.0, 4.0)


def test_one_that_was_never_scheduled_only_queued() -> None:
    result = StatsCollector(submitted_s=1.0).result(5.0)
    assert (result.queue_s, result.prefill_s, result.decode_s) == (4.0, 0.0, 0.0)
