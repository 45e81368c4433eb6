"""Who may come in and wait: bounds on bodies in memory, and on what is alive in the server, computed and waiting
together. Pure; time comes from a clock.

A request of n choices for p prompts counts n × p sequences, because that is what the engine has to hold. Permits are
taken before the first byte of an answer and given back exactly once, whatever happens in between. A refusal says when
to try again, judging by how fast room came free lately. Whoever would wait too long, at the pace at which sequences
were begun lately, is refused at once: a lowered budget, or experts that miss, show there as everything else does.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from expertd_server.errors import ApiError, RateLimited, Unavailable

RATE_WINDOW_S = 60.0
MAX_RETRY_AFTER_S = 60
"""OpenAI's clients give up instead of waiting for more than two minutes."""

UNKNOWN_RETRY_AFTER_S = 10

Clock = Callable[[], float]


class Rate:
    """How much of something ended in the last minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s = clock()
        self._events: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, amount: int) -> None:
        self._events.append((self._clock(), amount))
        self._total += amount
        self._forget()

    def seconds_for(self, amount: int) -> int:
        """Whole seconds until `amount` more will have ended at this rate, 1 to `MAX_RETRY_AFTER_S`; a guess where
        nothing ended lately."""
        self._forget()
        if not self._total:
            return UNKNOWN_RETRY_AFTER_S
        observed_s = min(self._clock() - self._began_s, RATE_WINDOW_S)
        return max(1, min(math.ceil(amount * observed_s / self._total), MAX_RETRY_AFTER_S))

    def _forget(self) -> None:
        while self._events and self._events[0][0] < self._clock() - RATE_WINDOW_S:
            self._total -= self._events.popleft()[1]


class Pace:
    """Seconds that somebody waited for each sequence that was begun. What is long ago counts less and less."""

    HALF_LIFE_S = 30.0
    """Of waiting: while nobody waits, nothing is learnt and nothing forgotten."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since_s: float | None = None
        self._waited_s = 0.0
        self._begun = 0.0

    def somebody_waits(self, waits: bool) -> None:
        """Whether anybody does from now on."""
        self._settle()
        self._since_s = self._clock() if waits else None

    def began(self) -> None:
        """A sequence that waited has its first step."""
        self._settle()
        self._begun += 1.0

    def seconds_for(self, sequences: int) -> float:
        """How long it takes until so many have begun; 0 while nothing is known."""
        self._settle()
        return sequences * self._waited_s / self._begun if self._begun else 0.0

    def _settle(self) -> None:
        if self._since_s is not None:
            now_s = self._clock()
            faded = 0.5 ** ((now_s - self._since_s) / self.HALF_LIFE_S)
            self._waited_s = self._waited_s * faded + now_s - self._since_s
            self._begun *= faded
            self._since_s = now_s


class BodyShare:
    """The bytes of one request's body."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._bytes = 0

    def add(self, size: int) -> None:
        """Count `size` bytes more. Raises Unavailable where they pass the bound."""
        refusal = self._bodies.refusal(size, others=self._bodies.used - self._bytes)
        if refusal is not None:
            raise refusal
        self._bytes += size
        self._bodies.used += size

    def ended(self) -> None:
        """The body is no more."""
        self._bodies.used -= self._bytes
        self._bodies.rate.add(self._bytes)
        self._bytes = 0


class Bodies:
    """Owner of the bytes of all bodies that have been read and are not yet prompts, whose own bounds hold from then on.
    One body alone is never too much: its size has a limit of its own."""

    def __init__(self, limit_bytes: int, clock: Clock = time.monotonic) -> None:
        self.used = 0
        self.rate = Rate(clock)
        self._limit = limit_bytes

    @contextmanager
    def share(self) -> Iterator[BodyShare]:
        """For one body, until the block ends."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            share.ended()

    def refusal(self, size: int, others: int) -> Unavailable | None:
        """Why `size` bytes more cannot be taken from a request beside which `others` bytes are held, if so."""
        excess = self.used + size - self._limit
        if excess <= 0 or not others:
            return None
        error = Unavailable(
            f"the bodies of other requests take {others} of {self._limit} bytes",
            retry_after_s=self.rate.seconds_for(excess),
            bound="bodies",
        )
        error.headers["connection"] = "close"  # the rest of the body is not read
        return error


class Permit:
    """One request's room. `started` hands back what only those who wait take up."""

    def __init__(self, admission: Admission, sequences: int, prompt_tokens: int) -> None:
        self._admission = admission
        self._waiting = sequences
        self._waiting_tokens = prompt_tokens

    def started(self, prompt_tokens: int) -> None:
        """A sequence with so many prompt tokens no longer waits."""
        prompt_tokens = min(prompt_tokens, self._waiting_tokens)
        self._waiting_tokens -= prompt_tokens
        self._admission.queued_tokens -= prompt_tokens
        self._admission.token_rate.add(prompt_tokens)
        if self._waiting:
            self._waiting -= 1
            self._admission.waits(-1)
            self._admission.pace.began()

    def ended(self) -> None:
        """Whatever still waits waits no longer."""
        self._admission.queued_tokens -= self._waiting_tokens
        self._admission.waits(-self._waiting)
        self._waiting = self._waiting_tokens = 0


class Admission:
    """Owner of the counts. `capacity` and `max_per_key` are in sequences."""

    def __init__(
        self,
        capacity: int,
        max_queued_tokens: int | None = None,
        max_per_key: int | None = None,
        max_wait_s: float = math.inf,
        clock: Clock = time.monotonic,
    ) -> None:
        self.capacity = capacity
        self.used = 0
        self.waiting = 0
        """Sequences whose first step has not begun."""
        self.queued_tokens = 0
        self.token_rate = Rate(clock)
        self.pace = Pace(clock)
        self._sequence_rate = Rate(clock)
        self._max_queued_tokens = max_queued_tokens
        self._max_per_key = max_per_key
        self._max_wait_s = max_wait_s
        self._used_by_key: Counter[str] = Counter()

    def require_possible(self, sequences: int) -> None:
        """Raises RateLimited or Unavailable for more sequences than there is ever room for, before anything is spent on
        them."""
        if self._max_per_key is not None and sequences > self._max_per_key:
            raise RateLimited(
                f"the request needs room for {sequences} sequences: a key may have {self._max_per_key} under way",
                retry_after_s=None,
            )
        if sequences > self.capacity:
            raise self._no_room(sequences)

    def require_room(self) -> None:
        """Raises Unavailable where there is none for a single sequence, before a prompt is tokenized in vain: a server
        that refuses much should spend little on it."""
        if self.used >= self.capacity:
            raise self._no_room(1)

    @contextmanager
    def permit(self, sequences: int, prompt_tokens: int = 0, key: str = "") -> Iterator[Permit]:
        """Room for `sequences`, whose prompts have `prompt_tokens` in all, while the block runs. Raises RateLimited
        where `key` has too much under way, Unavailable where the server has."""
        refusal = self._refusal(sequences, prompt_tokens, key)
        if refusal is not None:
            raise refusal
        permit = Permit(self, sequences, prompt_tokens)
        self.used += sequences
        self.waits(sequences)
        self.queued_tokens += prompt_tokens
        self._used_by_key[key] += sequences
        try:
            yield permit
        finally:
            permit.ended()
            self.used -= sequences
            self._used_by_key[key] -= sequences
            if not self._used_by_key[key]:
                del self._used_by_key[key]
            self._sequence_rate.add(sequences)

    def waits(self, more: int) -> None:
        """So many sequences more, or fewer, wait for their first step."""
        self.waiting += more
        self.pace.somebody_waits(self.waiting > 0)

    def _refusal(self, sequences: int, prompt_tokens: int, key: str) -> ApiError | None:
        if self._max_per_key is not None and self._used_by_key[key] + sequences > self._max_per_key:
            used = self._used_by_key[key]
            return RateLimited(
                f"the request needs room for {sequences} sequences: {used} of {self._max_per_key} of this key are "
                "under way",
                retry_after_s=self._when(self._sequence_rate, sequences, used, self._max_per_key),
            )
        if self.used + sequences > self.capacity:
            return self._no_room(sequences)
        limit = self._max_queued_tokens
        if limit is not None and self.queued_tokens + prompt_tokens > limit:
            return Unavailable(
                f"the request brings {prompt_tokens} prompt tokens: {self.queued_tokens} of at most {limit} wait",
                retry_after_s=self._when(self.token_rate, prompt_tokens, self.queued_tokens, limit),
                bound="queued_tokens",
            )
        return self._too_late(self.pace.seconds_for(self.waiting + 1)) if self.waiting else None

    def _too_late(self, expected_s: float) -> Unavailable | None:
        if expected_s <= self._max_wait_s:
            return None
        return Unavailable(
            f"{self.waiting} sequences wait: at the pace of late this one would begin in {expected_s:.0f} s, "
            f"and may wait {self._max_wait_s:g} s",
            retry_after_s=max(1, min(math.ceil(expected_s - self._max_wait_s), MAX_RETRY_AFTER_S)),
            bound="queue_wait",
        )

    def _no_room(self, sequences: int) -> Unavailable:
        return Unavailable(
            f"the request needs room for {sequences} sequences: {self.used} of {self.capacity} are taken",
            retry_after_s=self._when(self._sequence_rate, sequences, self.used, self.capacity),
        )

    @staticmethod
    def _when(rate: Rate, wanted: int, used: int, limit: int) -> int | None:
        return rate.seconds_for(wanted + used - limit) if wanted <= limit else None
