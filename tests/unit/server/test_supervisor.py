"""What is said of an engine that ended, and when a silent one is taken for wedged."""

from __future__ import annotations

import signal

import pytest

from expertd_server.supervisor import HEARTBEAT_S, LOOK_S, Silence, how_it_ended


def test_a_busy_engine_that_says_nothing_is_found_silent_in_time() -> None:
    silence = Silence(0.0)
    seconds = [silence.look(now, 0.0, busy=True) for now in range(int(HEARTBEAT_S) + 3)]
    assert max(seconds) > HEARTBEAT_S
    assert seconds == sorted(seconds)


def test_whoever_speaks_or_has_nothing_to_say_is_not_silent() -> None:
    silence = Silence(0.0)
    assert not any(silence.look(float(now), float(now), busy=True) for now in range(100))
    assert not any(silence.look(float(now), 99.0, busy=False) for now in range(100, 200))
    assert silence.look(200.0, 99.0, busy=True) <= 1.0  # it had no work until now


def test_time_in_which_all_was_frozen_counts_for_little() -> None:
    """A container that was paused for ten minutes: the engine could not speak, and has not been read yet."""
    silence = Silence(0.0)
    for now in range(5):
        silence.look(float(now), float(now), busy=True)
    assert silence.look(600.0, 4.0, busy=True) <= 2 * LOOK_S
    assert silence.look(601.0, 600.5, busy=True) == 0.0


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (None, "never started"),
        (0, "ended with status 0"),
        (5, "ended with status 5"),
        (-signal.SIGSEGV, "was ended by SIGSEGV"),
        (-signal.SIGKILL, "was ended by SIGKILL: by hand, or by the kernel for want of memory"),
        (-40, "was ended by signal 40"),
    ],
)
def test_how_a_process_ended_is_said_in_words(status: int | None, words: str) -> None:
    assert how_it_ended(status) == words
