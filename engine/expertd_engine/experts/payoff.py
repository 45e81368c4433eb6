"""Whether predictions pay in time: decides by trial, again and again, if they are to be made at all. Pure.

Precision says whether a prefetch was right, not whether it was worth its processor time: with small records, or a link
as quick as the processor, foresight costs more than it saves. So decode steps with and without it are timed by turns,
in blocks, and the quicker way is kept until the next trial. Steps differ for other reasons, so a trial that cannot tell
goes on for a while: then the ways differ little, and it costs little. What trials lose is bounded: `COST`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, median, stdev

BLOCK = 8
"""Steps of a kind in a row: what one block loads is still there in the next, so blocks are not too short."""
TRIAL = (True, False, False, True, True, False, False, True)
"""Blocks with and without: what drifts along falls on both alike."""
ROUNDS = 3
"""Times that a trial goes through these, at most."""
HOLD = 1216
"""Steps between trials at first. Each that confirms the one before doubles them."""
LONGEST = 8 * HOLD
"""Steps between trials that the doubling stops at."""
COST = 0.005
"""Of all time, that the slower way's steps in trials may lose."""
GRACE = 16
"""First steps, with foresight: the cache fills, the predictor proves itself."""
FIRST = GRACE + BLOCK * len(TRIAL)
"""Steps until it may have been found out for the first time whether foresight pays."""
SETTLED = GRACE + ROUNDS * BLOCK * len(TRIAL)
"""Steps until it has been."""
MARGIN = 0.01
"""Of the time of a step, by which the other way must be better to be taken."""
NOTICE = 64
"""Steps before a trial, from which on a predictor may prepare for it."""
_SURE = {4: 3.18, 8: 2.36, 12: 2.20}
"""Standard errors, by the ratios of blocks that there are: two sides of 95 % (Student)."""

_Times = tuple[list[float], list[float]]


class PayOff:
    """Told of every step. `is_on`: whether predictions are made in the step that begins next or runs."""

    def __init__(self, in_doubt: bool | None = None) -> None:
        """`in_doubt`: whether to make them where a trial cannot tell; None: as it seems better."""
        self.is_on = True
        self.switches = 0
        """Times that a trial has changed the way."""
        self.trials = 0
        self._in_doubt = in_doubt
        self._kept = True
        self._hold = HOLD
        self._left = GRACE
        """Steps until the next trial."""
        self._trial: dict[int, _Times] = {}
        """By rows, for like is compared with like: seconds of the trial's steps, without and with."""
        self._begun: deque[tuple[_Times | None, bool]] = deque()
        """Of the steps that run, the oldest first: where its seconds belong, and whether it has predictions."""

    @property
    def is_timed(self) -> bool:
        """Whether the step begun last belongs to a trial."""
        return bool(self._begun) and self._begun[-1][0] is not None

    @property
    def was_on(self) -> bool:
        """Whether the step that began first of those that run has predictions."""
        return self._begun[0][1] if self._begun else self.is_on

    def begin_off(self) -> None:
        """Until the first trial has told, make none. No step has begun."""
        self.is_on = self._kept = False

    def begin_anew(self) -> None:
        """What a step takes has changed for another reason: a trial under way begins once more. A step that was begun
        and is still to be told of belongs to none."""
        self._trial.clear()

    @property
    def is_near(self) -> bool:
        """Whether predictions are made, or may be soon."""
        return self._kept or self._left <= NOTICE

    def begin_step(self, rows: int | None, *, ahead: bool = False) -> bool:
        """A step of so many decoding rows begins; None: one of another kind, which foresees and is not timed. `ahead`:
        the one before has not ended; else it has, or never will."""
        if not ahead:
            self._begun.clear()
        self.is_on, times = self._kept, None
        if rows is not None and self._left > 0:
            self._left -= 1
        elif rows is not None:
            times = self._trial.setdefault(rows, ([], []))
            now = _arm(times)  # steps of the other arm that still run will not count
            self.is_on = _arm(times, sum(one is times and on is now for one, on in self._begun))
        self._begun.append((times, self.is_on))
        return self.is_on

    def end_step(self, seconds: float | None) -> None:
        """Of the steps that run the first has ended, well. None: it is no measure of anything."""
        times, was_on = self._begun.popleft() if self._begun else (None, False)
        if times is None or seconds is None or was_on is not _arm(times):
            return  # no measure; or of the block behind one that still lacks a step which brought none
        times[was_on].append(seconds)
        is_current = any(one is times for one in self._trial.values())
        if is_current and sum(map(len, times)) % (BLOCK * len(TRIAL)) == 0:
            self._judge(*times)

    def _judge(self, without: list[float], with_: list[float]) -> None:
        """A round has ended: the trial too, unless more steps could tell."""
        costs = [math.log(on / off) for on, off in zip(_blocks(with_), _blocks(without), strict=True)]
        cost, doubt = fmean(costs), _SURE[len(costs)] * stdev(costs) / math.sqrt(len(costs))
        if abs(cost) <= doubt > MARGIN and len(costs) < ROUNDS * len(TRIAL) // 2:
            return
        before = self._kept
        if abs(cost) > (MARGIN if self._in_doubt is None else max(doubt, MARGIN)):
            self._kept = cost < 0
        elif self._in_doubt is not None:
            self._kept = self._in_doubt
        self._end(before, lost=len(with_) * math.expm1(max(0.0, -cost if self._kept else cost)))

    def _end(self, before: bool, lost: float) -> None:
        """The trial has ended, in which the slower way took as much longer as `lost` of the quicker way's steps do."""
        self.switches += before is not self._kept
        self.trials += 1
        self._hold = min(2 * self._hold, LONGEST) if before is self._kept else HOLD
        self.is_on, self._left = self._kept, max(self._hold, math.ceil(lost / COST))
        self._trial.clear()


def _arm(times: _Times, more: int = 0) -> bool:
    """Of the next step of a trial that has these times, when so many more have been told."""
    return TRIAL[(sum(map(len, times)) + more) // BLOCK % len(TRIAL)]


def _blocks(seconds: Sequence[float]) -> list[float]:
    """The median of each block."""
    return [median(seconds[begin : begin + BLOCK]) for begin in range(0, len(seconds), BLOCK)]
