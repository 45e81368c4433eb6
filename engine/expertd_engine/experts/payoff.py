"""Whether predictions pay in time: decides by trial, again and again, if they are to be made at all. Pure.

Precision says whether a prefetch was right, not whether it was worth its processor time: with small records, or a link
as quick as the processor, foresight costs more than it saves. So decode steps with and without it are timed by turns,
in blocks, and the quicker way is kept until the next trial. A trial takes a twentieth of all steps.
"""

from __future__ import annotations

from statistics import median

BLOCK = 8
"""Steps of a kind in a row: what one block loads is still there in the next, so blocks are not too short."""
TRIAL = (True, False, False, True, True, False, False, True)
"""Blocks with and without: what drifts along falls on both alike."""
HOLD = 1216
"""Steps between trials: so a trial is a twentieth."""
GRACE = 16
"""First steps, with foresight: the cache fills, the predictor proves itself."""
SETTLED = GRACE + BLOCK * len(TRIAL)
"""Steps until it has been found out for the first time whether foresight pays."""
MARGIN = 0.01
"""Of the time of a step, by which the other way must be better to be taken."""

_Times = tuple[list[float], list[float]]


class PayOff:
    """Told of every step. `is_on`: whether predictions are made in the step that begins next or runs."""

    def __init__(self) -> None:
        self.is_on = True
        self.switches = 0
        """Times that a trial has changed the way."""
        self.trials = 0
        self._kept = True
        self._left = GRACE
        """Steps until the next trial."""
        self._trial: dict[int, _Times] = {}
        """By rows, for like is compared with like: seconds of the trial's steps, without and with."""
        self._timed: _Times | None = None
        """Where the running step's seconds belong."""

    def begin_step(self, rows: int | None) -> bool:
        """A step of so many decoding rows begins; None: one of another kind, which foresees and is not timed."""
        self._timed = None
        self.is_on = self._kept
        if rows is None:
            return self.is_on
        if self._left > 0:
            self._left -= 1
            return self.is_on
        self._timed = self._trial.setdefault(rows, ([], []))
        self.is_on = TRIAL[sum(map(len, self._timed)) // BLOCK]
        return self.is_on

    def end_step(self, seconds: float) -> None:
        """The step has ended well."""
        if self._timed is None:
            return
        self._timed[self.is_on].append(seconds)
        if sum(map(len, self._timed)) == BLOCK * len(TRIAL):
            self._judge(*map(median, self._timed))

    def _judge(self, without: float, with_: float) -> None:
        mine, other = (with_, without) if self._kept else (without, with_)
        if other < mine * (1 - MARGIN):
            self._kept = not self._kept
            self.switches += 1
        self.trials += 1
        self.is_on, self._left, self._timed = self._kept, HOLD, None
        self._trial.clear()
