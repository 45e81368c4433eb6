"""How much of the expert budget to lend to a box that is short of memory, and when to take it back. Pure.

Owner: `LiveBudget`. Down by a quarter at once, up by a sixteenth at a time: whoever stands still for memory waits for
pages that experts hold, while an expert that is not there yet costs one read. Between the two thresholds nothing moves,
and what is taken back too early is paid for with a longer calm before the next try.
"""

from __future__ import annotations

from dataclasses import dataclass

SHORT = 0.10
"""Share of an interval in which some task stood still for memory, from which on the box is short of it."""
CALM = 0.01
"""Share up to which it is not."""
SHRINK = 0.25
"""Of the experts' present bytes, lent at once."""
GROW = 0.0625
"""Of the budget, taken back at once."""
CALM_S = 10.0
"""Of calm before the first bytes are taken back."""
LONGEST_CALM_S = 320.0


@dataclass(frozen=True, slots=True)
class PressureReading:
    """What the kernel says of the time since the last reading."""

    at_s: float
    """On a steady clock."""
    stalled: float
    """Share of it in which some task stood still for memory (PSI `some`), 0 to 1; 0 where nobody measures it."""
    crossings: int = 0
    """Times that the cgroup's line (`memory.high`, or its limit) was met."""
    room: int | None = None
    """Bytes below that line, reclaimable page cache not counted; None: there is no line."""


class PressureControl:
    """The ceiling that readings put on the expert budget. Owner: the engine thread."""

    def __init__(self) -> None:
        self.lent_bytes = 0
        """Below the budget that is in force otherwise."""
        self.shrinks = 0
        """Times that bytes were lent."""
        self.stalled = 0.0
        """Of the last reading."""
        self._calm_s = CALM_S
        self._calm_since_s: float | None = None
        self._grew = False
        """Since bytes were last lent."""

    def ceiling(self, reading: PressureReading, planned: int, minimum: int, resident: int) -> int:
        """Bytes that experts may have, at least `minimum`: `planned`, less what is lent.

        `resident` is what they do have: what is not filled gives nothing back.
        """
        self.stalled = reading.stalled
        step = max(1, int(planned * GROW))
        has_room = reading.room is None or reading.room >= 2 * step
        # Page cache meets the line, too: it gives way by itself, so a line met with room below it is nobody's trouble.
        if reading.stalled >= SHORT or (reading.crossings and not has_room):
            self._lend(planned, minimum, resident)
        elif reading.stalled > CALM:
            self._calm_since_s = None
        elif self.lent_bytes and has_room:  # a line that is met again at once would be met for ever
            self._take_back(reading.at_s, step)
        self.lent_bytes = max(0, min(self.lent_bytes, planned - minimum))
        return planned - self.lent_bytes

    def _lend(self, planned: int, minimum: int, resident: int) -> None:
        if self._grew:  # it was too early
            self._calm_s = min(2 * self._calm_s, LONGEST_CALM_S)
        self._calm_since_s, self._grew = None, False
        target = max(minimum, int(min(resident, planned - self.lent_bytes) * (1 - SHRINK)))
        if planned - target > self.lent_bytes:
            self.lent_bytes = planned - target
            self.shrinks += 1

    def _take_back(self, now: float, step: int) -> None:
        if self._calm_since_s is None:
            self._calm_since_s = now
        if now - self._calm_since_s < self._calm_s:
            return
        self.lent_bytes -= min(self.lent_bytes, step)
        self._grew = True
        if not self.lent_bytes:
            self._calm_s = CALM_S
