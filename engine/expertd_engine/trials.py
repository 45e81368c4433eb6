"""Who is to blame for steps that fail by nobody in particular (a read, an allocation). Pure.

Such a step is tried again as it was, then in halves, and the halves in halves, until what still fails is one sequence
alone: that one ends. Whoever is not to blame loses time only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Trials:
    """Groups of sequences, by their ids, each to be tried in a step of its own. The scheduler's."""

    def __init__(self) -> None:
        self._groups: deque[Sequence[int]] = deque()
        self._on_trial = False
        """The step in flight is such a group."""

    @property
    def are_left(self) -> bool:
        """Whether the next step is such a group, or the one in flight is."""
        return self._on_trial or bool(self._groups)

    def next(self) -> Sequence[int]:
        """The ids to be tried next; none, where the next step is one as any other."""
        self._on_trial = bool(self._groups)
        return self._groups.popleft() if self._on_trial else ()

    def gave_up(self, ids: Sequence[int]) -> bool:
        """The step of these sequences gave up. Whether it is clear now who is to blame: the one that was in it."""
        half = len(ids) // 2
        if not self._on_trial:
            self._groups.appendleft(ids)
        elif half:
            self._groups.extendleft((ids[half:], ids[:half]))
        return self._on_trial and not half
