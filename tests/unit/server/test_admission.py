"""Room is counted in sequences and prompt tokens, for all and for each key, and always given back."""

from __future__ import annotations

import pytest

from expertd_server.admission import RATE_WINDOW_S, UNKNOWN_RETRY_AFTER_S, Admission, Pace, Rate
from expertd_server.errors import RateLimited, Unavailable


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_room_is_taken_for_every_sequence_and_given_back() -> None:
    admission = Admission(4)
    with admission.permit(3):
        with pytest.raises(Unavailable, match="3 of 4"), admission.permit(2):
            pass
        with admission.permit(1):
            assert admission.used == 4
    assert admission.used == 0


def test_room_is_given_back_after_an_error() -> None:
    admission = Admission(1, max_queued_tokens=10)
    with pytest.raises(KeyError), admission.permit(1, 10):
        raise KeyError
    assert (admission.used, admission.queued_tokens) == (0, 0)


def test_prompt_tokens_count_until_their_sequence_starts() -> None:
    admission = Admission(10, max_queued_tokens=100)
    with admission.permit(2, 80) as permit:
        with (
            pytest.raises(Unavailable, match="30 prompt tokens: 80 of at most 100") as refused,
            admission.permit(1, 30),
        ):
            pass
        assert int(refused.value.headers["retry-after"]) > 0
        permit.started(40)
        with admission.permit(1, 30):
            assert admission.queued_tokens == 70
    assert admission.queued_tokens == 0


def test_a_key_is_bounded_without_others_noticing() -> None:
    admission = Admission(10, max_per_key=2)
    with admission.permit(2, key="a"):
        with pytest.raises(RateLimited, match="2 of 2 of this key") as refused, admission.permit(1, key="a"):
            pass
        with admission.permit(2, key="b"):
            pass
    assert int(refused.value.headers["retry-after"]) > 0
    with admission.permit(2, key="a"):
        pass


@pytest.mark.parametrize(
    "admission", [Admission(2), Admission(9, max_queued_tokens=2), Admission(9, max_per_key=2)]
)  # fmt: skip
def test_what_can_never_fit_is_not_worth_a_retry(admission: Admission) -> None:
    with pytest.raises((Unavailable, RateLimited)) as never, admission.permit(3, 3):
        pass
    assert never.value.headers == {"x-should-retry": "false"}


def test_retry_after_follows_how_fast_sequences_end() -> None:
    clock = Clock()
    admission = Admission(4, clock=clock)
    for _ in range(8):  # one ends every 2 seconds
        with admission.permit(1):
            clock.now_s += 2
    with admission.permit(4), pytest.raises(Unavailable) as full, admission.permit(3):
        pass
    assert full.value.headers == {"retry-after": "6"}


def test_a_rate_forgets_what_is_long_ago() -> None:
    clock = Clock()
    rate = Rate(clock)
    assert rate.seconds_for(1) == UNKNOWN_RETRY_AFTER_S
    clock.now_s += 1
    rate.add(100)
    assert rate.seconds_for(1) == 1
    clock.now_s += RATE_WINDOW_S + 1
    assert rate.seconds_for(1) == UNKNOWN_RETRY_AFTER_S


def test_who_would_wait_too_long_at_the_pace_of_late_is_refused_at_once() -> None:
    clock = Clock()
    admission = Admission(100, max_wait_s=9.0, clock=clock)
    with admission.permit(8) as permit:
        for _ in range(4):
            clock.now_s += 2.0
            permit.started(0)
        with pytest.raises(Unavailable, match=r"4 sequences wait: .* begin in \d+ s") as refused, admission.permit(1):
            pass
        assert int(refused.value.headers["retry-after"]) >= 1
        permit.started(0)
        with admission.permit(1):
            assert admission.waiting == 4
    assert admission.waiting == 0
    clock.now_s += 1000.0
    with admission.permit(1):
        pass


def test_an_idle_time_is_no_slow_time() -> None:
    """Only waiting counts; where nobody waits, whoever comes is let in."""
    clock = Clock()
    admission = Admission(100, max_wait_s=1.0, clock=clock)
    for _ in range(20):
        with admission.permit(1) as permit:
            clock.now_s += 0.1
            permit.started(0)
            clock.now_s += 500.0
    with admission.permit(8), admission.permit(1):
        assert admission.waiting == 9


def test_a_pace_that_falls_is_noticed_and_forgotten_again() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.seconds_for(10) == 0.0
    pace.somebody_waits(True)
    for seconds in (0.1, 10.0, 0.1):
        for _ in range(400):
            clock.now_s += seconds
            pace.began()
        assert pace.seconds_for(10) == pytest.approx(10 * seconds, rel=0.8)
