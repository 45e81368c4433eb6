"""Who may wait: a bound on the sequences alive in the server, computed and waiting together. Pure.

A request of n choices for p prompts counts n × p, because that is what the engine has to hold. Permits are taken
before the first byte of an answer and given back exactly once, whatever happens in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from expertd_server.errors import Unavailable


class Admission:
    """Owner of the count. `capacity` is in sequences."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0

    @contextmanager
    def permit(self, sequences: int) -> Iterator[None]:
        """Room for `sequences` while the block runs. Raises Unavailable when there is none."""
        if self.used + sequences > self.capacity:
            raise self._refusal(sequences)
        self.used += sequences
        try:
            yield
        finally:
            self.used -= sequences

    def _refusal(self, sequences: int) -> Unavailable:
        return Unavailable(
            f"the request needs room for {sequences} sequences: {self.used} of {self.capacity} are taken",
            retry_after_s=1 if sequences <= self.capacity else None,
        )
