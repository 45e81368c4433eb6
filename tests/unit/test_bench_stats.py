"""Medians, intervals, limits and tables of the benchmarks, on numbers worked out by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

import pytest

from expertd_engine.bench.http_load import tokens_in
from expertd_engine.bench.report import FIELDS, finish, table
from expertd_engine.bench.stats import (
    Interval,
    bound_tok_s,
    median_interval,
    order_of,
    pairwise_interval,
    percentile,
    ratio_interval,
    serial_tok_s,
    settled_after,
    without_chance,
)
from expertd_engine.errors import EngineError


def test_the_interval_holds_the_median_and_shrinks_with_more_runs() -> None:
    rng = random.Random(1)
    few = median_interval([rng.gauss(10, 1) for _ in range(5)])
    many = median_interval([rng.gauss(10, 1) for _ in range(200)])
    assert few.low <= few.median <= few.high
    assert many.high - many.low < 0.5 < few.high - few.low
    assert many.low < 10 < many.high


def test_the_interval_of_equal_runs_is_a_point_and_a_seed_repeats_it() -> None:
    assert median_interval([3.0] * 7).as_json() == {"median": 3.0, "low": 3.0, "high": 3.0}
    values = [1.0, 5.0, 2.0, 4.0]
    assert median_interval(values) == median_interval(values)
    assert median_interval([4.0]).low == 4.0


def test_what_a_run_met_by_chance_is_taken_out_of_a_ratio_and_what_its_contender_did_is_not() -> None:
    """One contender takes 3 % longer; half of a run's time is chance, and the box drifts from pair to pair."""
    rng = random.Random(3)
    chance = [[rng.gauss(20, 8) for _ in range(8)] for _ in range(30)]
    slower = [1 + 0.03 * (group % 2) for group in range(30)]
    moment = [now for now in (1 + 0.1 * rng.random() for _ in range(15)) for _ in range(2)]
    times = [
        [(5 + 0.2 * met) * rng.gauss(1, 0.01) * slow * now for met in group]
        for group, slow, now in zip(chance, slower, moment, strict=True)
    ]
    times[6][5] *= 3  # a hiccup of the box
    as_met, found = (
        pairwise_interval([sum(one) / sum(other) for one, other in zip(groups[::2], groups[1::2], strict=True)])
        for groups in (times, without_chance(times, chance))
    )
    assert found.high - found.low < (as_met.high - as_met.low) / 4
    assert found.low < 1 / 1.03 < found.high < 0.99


def test_where_chance_says_nothing_ratios_stay() -> None:
    times = [[1.0, 1.1, 0.9, 1.05], [0.95, 1.02, 0.97, 1.0]]
    assert without_chance(times, [[7.0] * 4] * 2) == times
    assert without_chance(times, [[1.0, 2.0, 3.0, 4.0]] * 2) == times, "too few"
    with pytest.raises(ValueError, match="argument"):
        without_chance(times, [[1.0]] * 2)


@pytest.mark.parametrize("interval", [median_interval, pairwise_interval])
def test_the_intervals_cover_the_true_middle_about_as_often_as_they_say(
    interval: Callable[[Sequence[float]], Interval],
) -> None:
    rng = random.Random(7)
    intervals = [interval([rng.gauss(0, 1) for _ in range(15)]) for _ in range(40)]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals)
    assert 33 <= covered <= 40


def test_what_lies_between_two_values_each_is_told_from_few_values_as_from_many() -> None:
    assert pairwise_interval([2.0]).as_json() == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert pairwise_interval([1.0, 3.0]) == Interval(2.0, 1.0, 3.0)
    values = [float(value) for value in range(15)]
    assert pairwise_interval(values) == Interval(7.0, 4.5, 9.5), "Wilcoxon's 26th of 120 means from either end"
    assert pairwise_interval([*values[:-1], 1e9]).high < 12, "one odd value moves little"
    assert pairwise_interval(values[:6]) == Interval(2.5, 0.0, 5.0), "of six none can be left out"


def test_ratios_are_taken_within_pairs() -> None:
    """The box slows down by ten between the pairs; the contenders' ratio does not change."""
    ratio = ratio_interval([20.0, 2.0, 200.0], [10.0, 1.0, 100.0])
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="2 and 1 runs do not make pairs"):
        ratio_interval([1.0, 2.0], [1.0])


def test_no_values_have_no_median() -> None:
    with pytest.raises(ValueError, match="no values"):
        median_interval([])
    with pytest.raises(ValueError, match="no values"):
        pairwise_interval([])
    with pytest.raises(ValueError, match="no percentile"):
        percentile([], 0.5)


@pytest.mark.parametrize(("share", "value"), [(0.5, 5), (0.95, 10), (0.0, 1), (1.0, 10), (0.1, 1), (0.11, 2)])
def test_percentiles_are_nearest_ranks(share: float, value: float) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], share) == value


def test_everyone_is_first_as_often() -> None:
    assert [order_of(3, pair) for pair in range(3)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


def test_limits() -> None:
    """10 ms of compute a token; 40 MB a token at 2 GB/s take 20 ms."""
    assert bound_tok_s(100, 40e6, 2e9) == pytest.approx(50)
    assert serial_tok_s(100, 40e6, 2e9) == pytest.approx(1 / 0.030)
    assert bound_tok_s(100, 4e6, 2e9) == pytest.approx(100)
    assert bound_tok_s(100, 0, float("inf")) == serial_tok_s(100, 0, float("inf")) == 100


def test_the_pace_is_back_where_it_stays_back() -> None:
    assert settled_after([9, 1, 9, 9, 2, 1, 1, 1, 1, 1], 1.0) == 4
    assert settled_after([1.04] * 4, 1.0) == 0
    assert settled_after([1.2] * 20, 1.0) is None
    assert settled_after([1.0] * 3, 1.0) is None


def test_the_last_line_is_one_object_with_every_field() -> None:
    text = finish("title", ("run", "tok/s"), [["ours", "1.00"]], ["a note"], {"tok_s": 1.23456789, "device": "cpu"})
    result = json.loads(text.splitlines()[-1])
    assert result.keys() >= set(FIELDS)
    assert result["tok_s"] == 1.23457
    assert result["peer_tok_s"] is None


def test_the_table_lines_up() -> None:
    lines = table(("run", "tok/s"), [["ours", "1.00"], ["a longer name", "12,345.00"]]).splitlines()
    assert lines[2] == "ours                1.00"
    assert lines[3] == "a longer name  12,345.00"


def test_tokens_of_an_event_stream() -> None:
    assert tokens_in(b'data: {"choices":[{"text":"a","token_ids":[7]},{"text":"","token_ids":[1,2]}]}') == 3
    assert tokens_in(b'data: {"choices":[{"text":"","token_ids":null}]}') == 0
    assert [tokens_in(line) for line in (b"", b": keep-alive", b"data: [DONE]", b'data: {"usage":{}}')] == [0] * 4
    with pytest.raises(EngineError, match="no memory"):
        tokens_in(b'data: {"error":{"message":"no memory"}}')
