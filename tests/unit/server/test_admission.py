"""Room is counted in sequences and always given back."""

from __future__ import annotations

import pytest

from expertd_server.admission import Admission
from expertd_server.errors import Unavailable


def test_room_is_taken_for_every_sequence_and_given_back() -> None:
    admission = Admission(4)
    with admission.permit(3):
        with pytest.raises(Unavailable, match="3 of 4"), admission.permit(2):
            pass
        with admission.permit(1):
            assert admission.used == 4
    assert admission.used == 0


def test_room_is_given_back_after_an_error() -> None:
    admission = Admission(1)
    with pytest.raises(KeyError), admission.permit(1):
        raise KeyError
    assert admission.used == 0


def test_a_refusal_says_whether_to_try_again() -> None:
    admission = Admission(2)
    with admission.permit(1), pytest.raises(Unavailable) as full, admission.permit(2):
        pass
    with pytest.raises(Unavailable) as never, admission.permit(3):
        pass
    assert full.value.headers == {"retry-after": "1"}
    assert never.value.headers == {"x-should-retry": "false"}
