"""Virtual time, for simulations: seconds that pass because something is due, never because somebody waits."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Clock:
    """Virtual seconds, and what happens at which. Events of one instant happen in the order they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0

    def at(self, delay: float, act: Callable[[], None]) -> None:
        """Call `act` when `delay` seconds have passed."""
        self._order += 1
        heappush(self._events, (self.now + delay, self._order, act))

    def run_next(self) -> bool:
        """Go on to the next event and let it happen; False if there is none."""
        if not self._events:
            return False
        self.now, _, act = heappop(self._events)
        act()
        return True

    def advance(self, seconds: float) -> None:
        """Let time pass, and happen what happens meanwhile."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.run_next()
        self.now = end
