"""One engine with its foresight and without it, in turn: the same weights, pages and experts at hand, moments apart.

A box is quicker and slower by a tenth within some ten steps, whoever runs: so while foresight has switched itself off,
and nothing of it can reach the next step, steps with and without it take turns one by one; while it is on, in blocks,
so that little of what a block reads ahead is met by the next, which is of the other kind.

Two processes differ by a few per cent for as long as they live, by where their memory happens to lie; that is more than
what foresight may cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from statistics import fmean
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from expertd_engine.bench.protocol import Decoded, Turns, TurnsRequest
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.lookahead import Lookahead
from expertd_engine.experts.payoff import BLOCK, FIRST, PayOff
from expertd_engine.model.predictor import PredictorWatch
from expertd_engine.model.runner import Runner

STEPS = 4
"""Of a block while foresight is on."""


class Turner(Protocol):
    """The part of a session that this needs."""

    def start(self, prompt: int, tokens: int) -> Sequence[int]:
        """Have all streams decode, with room for so many tokens each: their ids."""
        ...

    def foresee(self, on: bool) -> None:
        """Go on with foresight, or as if there were none."""
        ...

    @property
    def payoff(self) -> PayOff | None:
        """Who tries whether foresight pays; None where nobody does, or foresight is taken away."""
        ...

    def window(self, warm: int, tokens: int, streams: int) -> Decoded:
        """Time `tokens` steps of all streams, after `warm` others."""
        ...

    def steps(self, arms: Iterator[bool], streams: int) -> list[Decoded]:
        """Time one step of all streams after the other, with foresight or without it as `arms` says in its turn."""
        ...

    def end(self, sequence_ids: Sequence[int]) -> None:
        """The streams are done with."""
        ...


def take_turns(session: Turner, request: TurnsRequest) -> Turns:
    """Raises EngineError if a sequence ends in an error."""
    streams = session.start(request.prompt, request.settle + 2 * request.pairs * request.tokens)
    session.foresee(True)
    whole = _settled(session, request.settle, len(streams))
    arms: tuple[list[list[Decoded]], list[list[Decoded]]] = [], []
    predicting: list[bool] = []
    for pair in range(request.pairs):
        session.foresee(True)
        order = turns_of(pair, request.tokens, STEPS if _may_predict(session) else 1)
        timed = session.steps(_with_notes(session, order, predicting), len(streams))
        for arm in (False, True):
            arms[arm].append([one for on, one in zip(order, timed, strict=True) if on is arm])
        whole += timed
    session.end(streams)
    prefetched, wasted = sum(one.prefetched_bytes for one in whole), sum(one.wasted_bytes for one in whole)
    return Turns(
        off=arms[False], on=arms[True], prefetched_bytes=prefetched, wasted_bytes=wasted, predicting=fmean(predicting)
    )


def turns_of(pair: int, tokens: int, steps: int) -> list[bool]:
    """Which steps of a pair go with foresight: as many as do without, in blocks of `steps`, off on on off or on off off
    on as chance has it, for some of what steps take comes back every so many tokens.
    """
    first = [(pair + four) % 2 for four in range(-(-tokens // (2 * steps)))]
    Random(pair).shuffle(first)
    twos = [(on, 1 - on) for one in first for on in (one, 1 - one)][: tokens // steps]
    return [bool(on) for two in twos for on in two for _ in range(steps)]


def _with_notes(session: Turner, order: Sequence[bool], predicting: list[bool]) -> Iterator[bool]:
    """The order; of each step with foresight, once it has run, whether there was any."""
    for on in order:
        yield on
        if on:
            predicting.append(session.payoff is None or session.payoff.is_on)


def _may_predict(session: Turner) -> bool:
    return session.payoff is None or session.payoff.is_near


def _settled(session: Turner, most: int, streams: int) -> list[Decoded]:
    """Go on until it is known whether foresight pays, for `most` steps at most."""
    windows, steps = [session.window(0, min(FIRST, most), streams)], FIRST
    while steps < most and not (session.payoff is None or session.payoff.trials):
        windows.append(session.window(0, min(BLOCK, most - steps), streams))
        steps += BLOCK
    return windows


def joined(parts: Sequence[Decoded]) -> Decoded:
    """Windows of equally many tokens as one."""
    sums = {name: sum(getattr(one, name) for one in parts) for name in _ADDED}
    return msgspec.structs.replace(parts[-1], **sums, union=fmean(one.union for one in parts))


_ADDED = (
    "elapsed_s", "cpu_s", "tokens", "hits", "late", "misses", "missed_bytes", "transferred_bytes", "stall_s",
    "lru_transferred_bytes", "hardness", "prefetched_bytes", "wasted_bytes",
)  # fmt: skip


class Switch:
    """Takes foresight away from an engine on a processor, which then has `plain`, and gives it back."""

    def __init__(self, cache: ExpertCache, runner: Runner, plain: Lookahead) -> None:
        self._cache, self._runner = cache, runner
        self._watches = [one for one in runner.onlookers if isinstance(one, PredictorWatch)]
        others = [one for one in runner.onlookers if not isinstance(one, PredictorWatch)]
        self._parts = (plain, None, others), (cache.lookahead, cache.payoff, runner.onlookers)

    def turn(self, on: bool) -> None:
        """Between steps."""
        self._cache.lookahead, self._cache.payoff, self._runner.onlookers = self._parts[on]

    def passed(self, chosen: Sequence[NDArray[np.int64]]) -> None:
        """A step has run without foresight, whose rows chose these in each layer: an engine that foresees would know.
        Told between steps, so that nobody's time holds it."""
        for watch in self._watches:
            watch.missed(chosen)
