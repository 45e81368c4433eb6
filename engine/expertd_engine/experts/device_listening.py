"""Hears where the layers of running launches route, and passes on what is foreseen from that. Pure.

Owner: the engine thread. While one launch runs another may be given to the device behind it; the table tells which of
the two is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from expertd_engine.experts.events import Hint
from expertd_engine.experts.lookahead import Lookahead

Heard = Callable[[int], Sequence[int]]
"""What a layer has routed to."""


def unheard(layer: int) -> Sequence[int]:
    """Of launches whose routes the host does not know before they have ended."""
    return ()


class Known(Protocol):
    """How far launches have come: `device_table.DeviceTable`."""

    def layers_known(self, launch: int) -> int: ...


@dataclass(slots=True)
class Listening:
    """To one launch."""

    step: int
    launch: int
    """By which the table knows it."""
    asked: Lookahead
    heard: Heard
    layers: int = 0
    """That have been heard of."""


class Listener:
    """Of one cache."""

    def __init__(self, table: Known) -> None:
        self._table = table
        self._now: Listening | None = None
        self._next: Listening | None = None
        """Launched behind the one that is heard."""

    def begin(self, launched: Listening, *, behind: bool) -> None:
        """It is about to be launched, `behind` another that has not ended or with none."""
        if behind:
            self._next = launched
        else:
            self._now, self._next = launched, None

    def forget(self) -> None:
        """No launch is to be heard any more."""
        self._now = self._next = None

    @property
    def layers(self) -> int:
        """Of the launch that is at work, so many have routed."""
        self._go_on()
        return 0 if self._now is None else self._table.layers_known(self._now.launch)

    @property
    def has_begun(self) -> bool:
        """Whether the launch given last is at work, or past it."""
        last = self._next or self._now
        return last is not None and self._table.layers_known(last.launch) > 0

    def hear(self) -> tuple[Listening, list[Hint]] | None:
        """What is foreseen now that more layers have routed; None if none has, or nobody hears of them."""
        known, now = self.layers, self._now
        if now is None or now.heard is unheard or known <= now.layers:
            return None
        now.layers = known
        # The newest layer says what the others would have said, for layers that have not run yet.
        return now, list(now.asked.routed(now.step, known - 1, now.heard(known - 1)))

    def _go_on(self) -> None:
        if self._next is not None and self._table.layers_known(self._next.launch):
            self._now, self._next = self._next, None
