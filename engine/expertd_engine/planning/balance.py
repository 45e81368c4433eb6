"""How what a card misses is shared out while it serves: in each layer on which both sides worked one was later, which
moves what is left to the processor. Speeds measured once, alone, cannot say it: both sides read one memory. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from expertd_engine.planning.misses import Misses, Split, left_to_processor

Shape = tuple[int, int]
"""Bytes of a record, and its inner neurons."""

_APART = 8
"""Up to so many missing experts each number is balanced for itself; more are in classes of powers of two."""
_FIRST_STEP = 0.2
"""By which a step moves the believed speed when all its layers say the same, as a logarithm; less with each step."""
_LEAST_STEP = 0.02
_SETTLING = 16
"""Steps after which a step moves half as much as the first."""
SETTLED = 4 * _SETTLING
"""Steps on which both sides worked until their balance can be judged."""
_MOST = math.log(8)
_KEPT = 1 - 1 / 256
"""Of what is believed of one number of missing experts alone, or of all if nobody tells of any, a step later: so what
is no longer tried is tried again."""
_HOPE = 0.01
"""By which the processor is believed to be quicker with each step while nobody would ask it for anything: it may have
been measured in a bad moment."""
_NOTICED = 0.05
"""Speeds as near as that to those of the present splits leave them."""
_AT_ONCE = 24
"""Splits found anew between two looks at a running step."""


class Balance:
    """Of layers of `shapes` that miss up to `most` experts: their present splits. It begins with the speeds `decided`
    for; one number, how much slower the processor is beside the link than they say, and one more for each class of
    missing experts, are moved by who was later."""

    def __init__(self, decided: Misses, shapes: Sequence[Shape], most: int) -> None:
        self._decided, self._most = decided, most
        self._all, self._own = 0.0, [0.0] * (_class_of(most) + 1)
        """Logarithms."""
        self._late: Counter[int] = Counter()
        self._early: Counter[int] = Counter()
        """Of the running step, by class: layers for which the processor was later, and for which it was not."""
        self._steps = 0
        self._used = [math.inf] * (most + 1)
        self.met_late = self.met_early = 0
        """Layers since the beginning."""
        self.splits: dict[Shape, list[Split]] = {shape: [Split()] * (most + 1) for shape in shapes}
        """By how many experts a layer misses."""
        self.refresh(most)

    @property
    def cpu_bytes_per_s(self) -> float:
        """What the processor is believed to compute while a step runs, if the link is as it was measured."""
        return self._decided.cpu_bytes_per_s / math.exp(self._all)

    def met(self, missing: int, *, late: bool) -> None:
        """A layer missed so many, was split as `splits` says, and the processor was later than the link, or not."""
        (self._late if late else self._early)[_class_of(missing)] += 1

    def end_step(self) -> None:
        """Take in what the step has met."""
        late, early = self._late.total(), self._early.total()
        self.met_late += late
        self.met_early += early
        self._own = [own * _KEPT for own in self._own]
        if not late + early:
            self._all = self._all * _KEPT if self._asks else _bounded(self._all - _HOPE)
            return
        step = max(_LEAST_STEP, _FIRST_STEP / (1 + self._steps / _SETTLING))
        self._all = _bounded(self._all + step * (late - early) / (late + early))
        for one in self._late.keys() | self._early.keys():
            late, early = self._late[one], self._early[one]
            self._own[one] = _bounded(self._own[one] + step * (late - early) / (late + early))
        self._steps += 1
        self._late.clear()
        self._early.clear()

    @property
    def is_settled(self) -> bool:
        """Whether enough steps have moved the splits for these to be judged by the time that steps take."""
        return self._steps >= SETTLED

    @property
    def _asks(self) -> bool:
        """Whether the processor is left anything where few are missing."""
        return any(split != Split() for splits in self.splits.values() for split in splits[: _APART + 1])

    def refresh(self, at_once: int = _AT_ONCE) -> bool:
        """Have `splits` follow, so many at once, those of few missing experts first; whether any has changed."""
        before = {shape: list(splits) for shape, splits in self.splits.items()}
        slower = [self._all + self._own[_class_of(missing)] for missing in range(self._most + 1)]
        moved = [n for n in range(1, self._most + 1) if abs(slower[n] - self._used[n]) > _NOTICED]
        for missing in moved[:at_once]:
            self._used[missing] = slower[missing]
            for (nbytes, inner), splits in self.splits.items():
                splits[missing] = self._split(missing, math.exp(slower[missing]), nbytes, inner)
        return self.splits != before

    def _split(self, missing: int, slower: float, nbytes: int, inner: int) -> Split:
        decided, now = self._decided, self._decided.cpu_bytes_per_s / slower
        believed = replace(decided, cpu_bytes_per_s=now, cpu_start_s=decided.cpu_start_s * slower)
        return left_to_processor(missing, believed, nbytes, inner)


def _class_of(missing: int) -> int:
    return missing if missing <= _APART else _APART + (missing - 1).bit_length() - _APART.bit_length() + 1


def _bounded(slower: float) -> float:
    return min(max(slower, -_MOST), _MOST)
