"""Sampling against naive references and exact probabilities, and noise that depends on nothing but its counter."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from expertd_engine.messages import Sampling, TokenLogprob
from expertd_engine.model.read_out import TensorLogits, read_out
from expertd_engine.model.sampler import NoTokenLeft, SampleRow, best_ids, sample, token_logprob, uniform
from expertd_engine.step_plan import Chunk, StepPlan
from support.builders_core import make_sequence

LOGITS = torch.tensor([1.0, 3.0, 2.5, -1.0, 0.0, 2.0])


def options(**settings: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "seed": 7, **settings})


def row(
    sampling: Sampling, *, prompt: int = 5, outputs: tuple[int, ...] = (), choice: int = 0, **more: Any
) -> SampleRow:
    return SampleRow(sampling, choice, [0] * prompt, outputs, **{"banned": (), **more})


def draws(logits: torch.Tensor, sampling: Sampling, count: int) -> Counter[int]:
    """Tokens at positions 1 to `count`."""
    return Counter(sample(logits, row(sampling, prompt=position))[0] for position in range(1, count + 1))


def chi_square(counts: Counter[int], probabilities: torch.Tensor) -> float:
    total = sum(counts.values())
    return float(sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(probabilities.tolist()) if p > 0))


# ---------------------------------------------------------------- noise


def test_noise_is_a_function_of_seed_choice_and_position_alone() -> None:
    torch.manual_seed(1)
    first = [uniform(3, 0, p) for p in range(50)]
    torch.manual_seed(2)
    assert [uniform(3, 0, p) for p in reversed(range(50))] == first[::-1]
    assert all(0 <= u < 1 for u in first)


def test_noise_differs_between_neighbours_and_between_large_seeds() -> None:
    seeds = (0, 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
    values = [uniform(seed, choice, position) for seed in seeds for choice in (0, 1, 7) for position in (0, 1, 2, 4096)]
    assert len(set(values)) == len(values)


def test_noise_is_uniform_and_uncorrelated_from_position_to_position() -> None:
    values = torch.tensor([uniform(11, 0, p) for p in range(4096)], dtype=torch.float64)
    counts = torch.histc(values, 16, 0, 1)
    assert float(((counts - 256) ** 2 / 256).sum()) < 30.6  # 1 % point of 15 degrees of freedom
    centred = values - values.mean()
    assert abs(float((centred[1:] * centred[:-1]).mean() / centred.var())) < 0.05


def test_noise_keeps_its_values_between_releases() -> None:
    """A seed that a user has kept gives the same text after an update."""
    assert uniform(0, 0, 0) == 0.011546754286331562
    assert uniform(2**64 - 1, 3, 1000) == 0.6344591150043761


# ---------------------------------------------------------------- the distribution


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax(temperature: float) -> None:
    counts = draws(LOGITS, options(temperature=temperature), 3000)
    assert chi_square(counts, (LOGITS.double() / temperature).softmax(0)) < 15.1  # 1 % point of 5


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 5]),
        ({"top_k": 6}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 1000}, [0, 1, 2, 3, 4, 5]),
        ({"min_p": 1.0}, [1]),
        ({"min_p": math.exp(-1.001)}, [1, 2, 5]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.45}, [1]),  # the best has 0.461
        ({"top_p": 0.47}, [1, 2]),
        ({"top_p": 0.75}, [1, 2, 5]),  # the best two have 0.741
        ({"top_p": 0.6, "top_k": 3}, [1, 2]),  # 0.506 and 0.307 of the three
        ({"top_p": 0.99, "min_p": math.exp(-0.6)}, [1, 2]),
    ],
)
def test_what_the_cuts_leave_is_renormalised(settings: dict[str, Any], kept: list[int]) -> None:
    counts = draws(LOGITS, options(**settings), 1500)
    assert sorted(counts) == kept
    masked = torch.full_like(LOGITS, -torch.inf).double()
    masked[kept] = LOGITS[kept].double()
    assert chi_square(counts, masked.softmax(0)) < 15.1


def test_greedy_takes_the_best_and_of_equals_the_lowest() -> None:
    assert sample(LOGITS, row(options(temperature=0.0)))[0] == 1
    assert sample(torch.tensor([0.0, 2.0, 2.0, 2.0]), row(options(temperature=0.0)))[0] == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-3])
def test_a_temperature_near_zero_is_greedy_not_an_overflow(temperature: float) -> None:
    assert set(draws(LOGITS * 10, options(temperature=temperature), 20)) == {1}


def test_infinite_and_banned_scores_never_come() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 50.0, 0.0])
    sampling = options(temperature=3.0)
    for position in range(200):
        assert sample(logits, row(sampling, prompt=position, banned=frozenset({2})))[0] in (1, 3)
    assert sample(logits, row(options(temperature=0.0), banned=[2]))[0] == 1


def test_the_row_alone_decides() -> None:
    sampling = options(temperature=1.3, top_p=0.9, logprobs=2)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(32, 500, generator=generator)
    alone = [sample(batch[i].clone(), row(sampling, prompt=i)) for i in range(32)]
    assert [sample(batch[i], row(sampling, prompt=i)) for i in reversed(range(32))] == alone[::-1]
    assert len({token for token, _ in alone}) > 10


def test_choices_of_one_prompt_differ() -> None:
    flat = torch.zeros(1000)
    assert len({sample(flat, row(options(), choice=choice))[0] for choice in range(8)}) == 8


# ---------------------------------------------------------------- penalties and bias


def naive_penalties(logits: torch.Tensor, how: SampleRow) -> list[float]:
    seen = {*how.prompt_token_ids, *how.output_token_ids}
    counts = Counter(how.output_token_ids)
    sampling = how.sampling
    scores = []
    for i, score in enumerate(logits.tolist()):
        if i in seen:
            score = score / sampling.repetition_penalty if score > 0 else score * sampling.repetition_penalty
        if counts[i]:
            score -= counts[i] * sampling.frequency_penalty + sampling.presence_penalty
        scores.append(score + sampling.logit_bias.get(i, 0.0))
    return scores


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"frequency_penalty": 0.8},
        {"presence_penalty": -1.5},
        {"logit_bias": {3: 6.0, 1: -100.0}},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.4, "logit_bias": {4: 2.5}},
    ],
)
def test_penalties_and_bias_change_the_distribution_as_defined(settings: dict[str, Any]) -> None:
    outputs = (2, 3, 2, 2)
    sampling = options(**settings)
    expected = torch.tensor(naive_penalties(LOGITS, row(sampling, outputs=outputs)), dtype=torch.float64).softmax(0)
    counts = Counter(
        sample(LOGITS, row(replace_seed(sampling, seed), prompt=1, outputs=outputs))[0] for seed in range(1500)
    )
    assert chi_square(counts, expected) < 15.1
    greedy = row(options(**{**settings, "temperature": 0.0}), outputs=outputs)
    assert sample(LOGITS, greedy)[0] == int(expected.argmax())


def replace_seed(sampling: Sampling, seed: int) -> Sampling:
    return Sampling(**{**{name: getattr(sampling, name) for name in sampling.__struct_fields__}, "seed": seed})


def test_the_logits_given_are_left_as_they_are() -> None:
    logits = LOGITS.clone()
    sampling = options(repetition_penalty=2.0, frequency_penalty=1.0, logit_bias={0: 5.0}, top_k=2, logprobs=3)
    sample(logits, row(sampling, outputs=(1, 2), banned=[1]))
    assert torch.equal(logits, LOGITS)


# ---------------------------------------------------------------- log-probabilities


def test_logprobs_are_those_of_the_model_whatever_the_sampling() -> None:
    sampling = options(temperature=0.0, logit_bias={4: 100.0}, logprobs=3)
    token, entry = sample(LOGITS, row(sampling))
    assert token == 4 and entry is not None
    expected = LOGITS.log_softmax(-1)
    assert entry.logprob == pytest.approx(float(expected[4]), abs=1e-6)
    assert [top.token_id for top in entry.top] == [1, 2, 5]
    assert [top.logprob for top in entry.top] == pytest.approx(expected[[1, 2, 5]].tolist(), abs=1e-6)


def test_logprobs_not_asked_for_are_not_given() -> None:
    assert sample(LOGITS, row(options()))[1] is None
    entry = sample(LOGITS, row(options(logprobs=0)))[1]
    assert entry is not None and entry.top == []
    assert len(token_logprob(LOGITS, 0, 100).top) == len(LOGITS)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_of_equals_the_lowest_ids_come_first(count: int) -> None:
    scores = torch.tensor([1.0, 5.0, 1.0, 5.0, 1.0, -torch.inf, 0.0, -torch.inf])
    assert best_ids(scores, count).tolist() == [1, 3, 0, 2, 4, 6, 5, 7][:count]
    assert [top.token_id for top in token_logprob(scores, 0, count).top] == [1, 3, 0, 2, 4, 6, 5, 7][:count]


# ---------------------------------------------------------------- what may come at all


def test_nothing_but_the_allowed_tokens_comes_in_their_own_proportions() -> None:
    allowed = [0, 3, 5]
    counts = draws(LOGITS, options(allowed_token_ids=allowed), 2000)
    assert set(counts) == set(allowed)
    probabilities = torch.full_like(LOGITS, -math.inf).index_copy(0, torch.tensor(allowed), LOGITS[allowed]).softmax(0)
    assert chi_square(counts, probabilities) < 9.21  # 1 % point of 2 degrees of freedom
    assert sample(LOGITS, row(options(temperature=0.0, allowed_token_ids=allowed)))[0] == 5


def test_a_bias_cannot_bring_a_token_in_that_is_not_allowed() -> None:
    assert sample(LOGITS, row(options(temperature=0.0, allowed_token_ids=[3], logit_bias={1: 100.0})))[0] == 3


@pytest.mark.parametrize(
    ("words", "outputs", "expected"),
    [
        ([[1]], (), 2), ([[1]], (4,), 2), ([[1], [2]], (), 5), ([[0, 1]], (), 1), ([[0, 1]], (0,), 2),
        ([[0, 1]], (0, 4), 1), ([[4, 0, 1]], (4, 0), 2), ([[4, 0, 1]], (0,), 1), ([[4, 0, 1], [0, 2]], (4, 0), 5),
    ],
)  # fmt: skip
def test_the_last_token_of_a_bad_word_is_barred_where_the_others_came_before_it(
    words: list[list[int]], outputs: tuple[int, ...], expected: int
) -> None:
    """From best to worst the tokens are 1, 2, 5."""
    assert sample(LOGITS, row(options(temperature=0.0, bad_words=words), outputs=outputs))[0] == expected


def test_a_bad_word_that_began_in_the_prompt_is_not_the_answers() -> None:
    said = SampleRow(options(temperature=0.0, bad_words=[[4, 1]]), 0, [4], (), ())
    assert sample(LOGITS, said)[0] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_everything_is_barred_no_token_is_made_up(temperature: float) -> None:
    sampling = options(temperature=temperature, allowed_token_ids=[1, 2], bad_words=[[1]])
    with pytest.raises(NoTokenLeft, match="allowed_token_ids, bad_words"):
        sample(LOGITS, row(sampling, banned=(2,)))


# ---------------------------------------------------------------- threads


class Counting(TensorLogits):
    """Counts the library's threads whenever a token is chosen."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(logits)
        self.threads: list[int] = []

    def choose(self, row: int, how: SampleRow) -> tuple[int, TokenLogprob | None]:
        self.threads.append(torch.get_num_threads())
        return super().choose(row, how)


def test_rows_are_read_out_on_one_thread_and_then_there_are_as_many_as_before() -> None:
    before, sequence, logits = torch.get_num_threads(), make_sequence(3), Counting(LOGITS[None])
    torch.set_num_threads(2)
    try:
        read_out(StepPlan(0, "exact", (Chunk(sequence, 0, 3, samples=True),), ()), logits)
        assert (logits.threads, torch.get_num_threads()) == ([1], 2)
        with pytest.raises(IndexError):
            read_out(StepPlan(0, "exact", (Chunk(sequence, 0, 3, samples=True),), ()), Counting(LOGITS[:0, None]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
