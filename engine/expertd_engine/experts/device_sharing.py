"""The table on a card that says what its steps leave to the processor, and what they tell of it.

Owner: the engine thread, which rewrites the table between launches. `planning.balance` says what stands in it where
link and processor share, trials (`payoff`) whether they are to: a card that reads alone is the other way, and its steps
then run a program that asks nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from expertd_engine.experts.device_streams import Device
from expertd_engine.experts.payoff import PayOff
from expertd_engine.planning.balance import Balance, Shape
from expertd_engine.planning.misses import Misses, Split, left_to_processor
from expertd_engine.snapshot import Shared

_TOLD = 8
"""Missing experts of a layer up to which status says what is left to the processor."""

_QUIET = 8
"""Steps that missed nothing after which none asks, until one misses again."""


class Sharing:
    """Of layers of `shapes`, which miss up to `most` experts, as was `decided`."""

    def __init__(self, device: Device, decided: Misses, shapes: Sequence[Shape], most: int) -> None:
        self.payoff = PayOff(in_doubt=True)
        """Whether the processor takes part, where both may."""
        self.balance = Balance(decided, sorted(set(shapes)), most) if decided.where == "both" else None
        self.later = device.pinned(len(shapes), torch.int32)
        """int32 `[L]`: see `kernels.cuda.host_experts.Mailbox`."""
        self._device, self._shapes = device, list(shapes)
        self._sent = device.pinned(2 * len(shapes) * (most + 1), torch.int32).view(len(shapes), most + 1, 2)
        fixed = {one: [left_to_processor(n, decided, *one) for n in range(most + 1)] for one in set(shapes)}
        self._write(fixed if self.balance is None else self.balance.splits)
        self.splits = self._sent.to(device.torch_device, copy=True)
        """int32 `[L, most + 1, 2]`, on the device."""
        self.asks = True
        """Whether the launch that is under way, or was last, asks the processor."""
        self._ended_asked = False
        """Whether the launch that ended last asked."""
        self._changed = False
        self._hits = 0
        """Steps, of late, that missed nothing."""

    @property
    def divides(self) -> bool:
        """Whether an expert may be divided between the two."""
        return self.balance is not None

    def begin_timed(self, rows: int | None, *, ahead: bool = False) -> None:
        """A step of so many decoding rows is about to begin; None: one that nothing is tried in. Sharing is not judged
        before its balance has been found. `ahead`: as for `PayOff.begin_step`."""
        judged = self.balance is not None and self.balance.is_settled
        self.payoff.begin_step(rows if judged else None, ahead=ahead)

    def end_timed(self, seconds: float | None, missed: int) -> None:
        """It has ended well. One that missed nothing had nothing to share, and tells nothing; nor does one that asked
        nobody for want of misses before it."""
        self._hits = 0 if missed else self._hits + 1
        self.payoff.end_step(seconds if missed and self._ended_asked is self.payoff.was_on else None)

    def before_launch(self, *, may_ask: bool) -> bool:
        """Have the next launch find the table as it is to be; whether it is to ask at all. Of those before it only the
        last may run still. `may_ask`: its program can."""
        self.asks = may_ask and (self.balance is None or (self.payoff.is_on and self._hits < _QUIET))
        if self.balance is not None and self.asks and self._changed:
            self._changed = False
            self._write(self.balance.splits)
            self._device.compute.copy([(self.splits, self._sent)])
        return self.asks

    def after_launch(self) -> None:
        """A launch is under way: there is time to find out what the next one is to be told."""
        if self.balance is not None and self.asks and self.balance.refresh():
            self._changed = True

    def end_step(self, *, asked: bool) -> None:
        """The first launch that runs has ended, which `asked` or did not: take in who was later. Another may run
        already, and tell of its first layers."""
        self._ended_asked = asked
        if self.balance is None or not asked:
            return
        for layer, told in enumerate(self.later.tolist()):
            if told:
                self.later[layer] = 0  # told once, even where no launch comes before the next end
                self.balance.met(told // 2, late=bool(told % 2))
        self.balance.end_step()

    def as_status(self) -> Shared | None:
        """None where nothing is shared."""
        if self.balance is None:
            return None
        inner, splits = self._shapes[0][1], self.balance.splits[self._shapes[0]]
        left = [_experts(split, inner) for split in splits[1 : _TOLD + 1]]
        payoff, balance = self.payoff, self.balance
        counts = (balance.met_late, balance.met_early, payoff.trials, payoff.switches)
        return Shared(payoff.is_on, balance.cpu_bytes_per_s, left, *counts)

    def _write(self, splits: dict[Shape, list[Split]]) -> None:
        numbers = {shape: np.array(one, np.int32) for shape, one in splits.items()}
        for layer, shape in enumerate(self._shapes):
            self._sent.numpy()[layer] = numbers[shape]


def _experts(split: Split, inner: int) -> float:
    return split.whole + (1 - split.cut / inner if split.cut else 0.0)
