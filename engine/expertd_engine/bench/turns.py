"""One engine with its foresight and without it, in turn: the same weights, pages and experts at hand, moments apart.

Windows are taken in parts, with and without in turn: routes change from moment to moment, as the box does.

Two processes differ by a few per cent for as long as they live, by where their memory happens to lie; that is more than
what foresight may cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Protocol

import msgspec

from expertd_engine.bench.protocol import Decoded, Turns, TurnsRequest
from expertd_engine.bench.stats import order_of
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.lookahead import Lookahead
from expertd_engine.experts.payoff import BLOCK, FIRST, PayOff
from expertd_engine.model.predictor import PredictorWatch
from expertd_engine.model.runner import Runner


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

    def end(self, sequence_ids: Sequence[int]) -> None:
        """The streams are done with."""
        ...


def take_turns(session: Turner, request: TurnsRequest) -> Turns:
    """Raises EngineError if a sequence ends in an error."""
    each = request.parts * request.warm + request.tokens
    streams = session.start(request.prompt, request.settle + 2 * request.pairs * each)
    session.foresee(True)
    whole = _settled(session, request.settle, len(streams))
    samples: tuple[list[Decoded], list[Decoded]] = [], []
    predicting = 0
    for pair in range(request.pairs):
        parts: tuple[list[Decoded], list[Decoded]] = [], []
        for part in range(request.parts):
            for on in order_of(2, pair * request.parts + part):
                session.foresee(bool(on))
                parts[on].append(session.window(request.warm, request.tokens // request.parts, len(streams)))
                predicting += on and _predicts(session)
        for arm, found in zip(samples, parts, strict=True):
            arm.append(joined(found))
    session.end(streams)
    whole += samples[0] + samples[1]
    prefetched, wasted = sum(one.prefetched_bytes for one in whole), sum(one.wasted_bytes for one in whole)
    return Turns(
        off=samples[0], on=samples[1], prefetched_bytes=prefetched, wasted_bytes=wasted,
        predicting=predicting / (request.pairs * request.parts),
    )  # fmt: skip


def _settled(session: Turner, most: int, streams: int) -> list[Decoded]:
    """Go on until it is known whether foresight pays, for `most` steps at most."""
    windows, steps = [session.window(0, min(FIRST, most), streams)], FIRST
    while steps < most and not (session.payoff is None or session.payoff.trials):
        windows.append(session.window(0, min(BLOCK, most - steps), streams))
        steps += BLOCK
    return windows


def _predicts(session: Turner) -> bool:
    return session.payoff is None or session.payoff.is_on


def joined(parts: Sequence[Decoded]) -> Decoded:
    """Windows of equally many tokens as one."""
    sums = {name: sum(getattr(one, name) for one in parts) for name in _ADDED}
    return msgspec.structs.replace(parts[-1], **sums, union=fmean(one.union for one in parts))


_ADDED = (
    "elapsed_s", "tokens", "hits", "late", "misses", "missed_bytes", "transferred_bytes", "stall_s",
    "lru_transferred_bytes", "expected_misses", "prefetched_bytes", "wasted_bytes",
)  # fmt: skip


class Switch:
    """Takes foresight away from an engine on a processor, which then has `plain`, and gives it back."""

    def __init__(self, cache: ExpertCache, runner: Runner, plain: Lookahead) -> None:
        self._cache, self._runner = cache, runner
        others = [one for one in runner.onlookers if not isinstance(one, PredictorWatch)]
        self._parts = (plain, None, others), (cache.lookahead, cache.payoff, runner.onlookers)

    def turn(self, on: bool) -> None:
        """Between steps."""
        self._cache.lookahead, self._cache.payoff, self._runner.onlookers = self._parts[on]
