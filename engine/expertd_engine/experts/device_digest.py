"""Tells a device's ledger what launches met, piece by piece, and has slots set aside for those to come.

Owner: the engine thread, which has little time while a launch runs: copies for it must not wait for what is said of the
one before. All of it is said before the launch after the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from expertd_engine.experts.device_aside import Aside
from expertd_engine.experts.device_events import DeviceEvent, Landed, Provide, Seen
from expertd_engine.experts.device_executor import Executor
from expertd_engine.experts.device_pool import Use
from expertd_engine.experts.device_report import Launch, num_misses, read_at_once, read_report
from expertd_engine.experts.events import Tick

if TYPE_CHECKING:
    from expertd_engine.experts.device_steps import DeviceSteps

_EVICTIONS = 8
"""Between two looks at the running launch."""
_TOLD_AT_ONCE = 8
"""Layers of a launch that has ended, likewise."""


class Digest:
    """Of the launches of one cache, each told of while the next one runs."""

    def __init__(self, cache: DeviceSteps, executor: Executor) -> None:
        self._cache, self._executor = cache, executor
        self._aside = Aside()
        self._prefetches_before = 0
        self._going: Iterator[None] = iter(())
        self._unread: Launch | None = None
        self._telling: Launch | None = None
        """Whom `_going` tells of, if of any."""
        self._first = np.cumsum([0, *cache.ledger.experts_per_layer])[:-1]

    def begin(self, launch: Launch) -> None:
        """A launch is under way: take in the one before, as there is time, and set aside what the next may need, if
        that is not known."""
        self.finish()
        before, self._unread = self._unread, launch
        told = iter(()) if before is None else self._told(before)
        self._going = told if len(launch.known) else chain(told, self._set_aside())

    def take_in(self) -> None:
        """Nothing runs: take in what is due, without setting anything aside."""
        self.finish()
        if (launch := self._unread) is not None:
            self._unread = None
            self._going = self._told(launch)
            self.finish()

    def go_on(self) -> None:
        """Take in a piece."""
        next(self._going, None)

    def finish(self) -> None:
        """Take in all that has begun, waiting for the end of the launch that it is of."""
        if self._telling is not None:
            self._telling.ended.wait()
            self._telling = None
        for _ in self._going:
            self._executor.copies.begin()  # the link need not wait for it

    @property
    def is_ready(self) -> bool:
        """Whether `catch_up` would not wait."""
        return self._unread is None or self._unread.ended.done()

    def catch_up(self) -> None:
        """Take in the launch whose report is due, waiting for its end."""
        self.finish()
        if self._unread is not None:
            launch, self._unread = self._unread, None
            self._going = chain(self._told(launch), self._set_aside())
            self.finish()

    def wanted(self, streamed: int | None = None) -> Provide:
        """What to set aside; `streamed`: as `Aside.wanted`."""
        cache, pool = self._cache, self._cache.ledger.pool
        unused = max(0, pool.limit - pool.number(Use.OWNED, Use.LENT))
        if cache.ledger.kept:
            unused = 0  # what virtual mode swaps in needs them, and nobody takes back what steps were handed
        absent = sum(cache.ledger.experts_per_layer) - pool.number(Use.OWNED)
        copies_alone = cache.computing is not None and not cache.computing.lands
        brings_in = cache.computing is not None and cache.ledger.brings_in
        room = 0 if cache.by_layer or copies_alone else cache.table.layout.landing
        return self._aside.wanted(
            slots=self.movable, unused=unused, absent=absent, room=room, foresees=cache.foresees or brings_in,
            wanted=len(cache.ledger.wanted), streamed=streamed,
        )  # fmt: skip

    @property
    def movable(self) -> int:
        """Slots that are not kept for anybody."""
        return self._cache.ledger.pool.limit - len(self._cache.ledger.kept)

    def _told(self, launch: Launch) -> Iterator[None]:
        """Tell of a launch, piece by piece, once it has ended."""
        self._telling = launch
        return self._pieces(launch)

    def _pieces(self, launch: Launch) -> Iterator[None]:
        while not launch.ended.done():
            yield
        report = self._cache.table.report(launch.turn)
        end = Tick((launch.step + 1) * self._cache.period)
        if len(launch.known) and (met := read_at_once(report, launch, self._first)) is not None:
            self._executor.count_read(met)
            self._executor.handle([met, end])
            self._tell_aside(None)
            yield
            self._cache.ledger.arrange()
            return
        misses = 0
        told = read_report(report, launch, self._cache.shared_bytes)
        while few := list(islice(told, _TOLD_AT_ONCE)):
            misses += self._tell(few, launch)
            yield
        self._executor.handle([end])
        self._tell_aside(None if len(launch.known) else misses)
        yield

    def _tell(self, layers: Sequence[tuple[Seen, list[Landed]]], launch: Launch) -> int:
        """What a launch met in a few layers; how many experts it read over the link."""
        events: list[DeviceEvent] = []
        landings: list[Landed] = []
        for seen, landed in layers:
            self._executor.count_met(seen)
            hints = [] if len(launch.known) else self._cache.foreseen_late(seen, launch.step)
            events += [seen, *landed, *hints]
            landings += landed
        self._executor.handle(events, landings)
        return sum(num_misses(seen) for seen, _ in layers)

    def _tell_aside(self, misses: int | None) -> None:
        """None: of a step for which nothing need have been set aside."""
        ledger = self._cache.ledger
        issued = ledger.counters.prefetch_issued + ledger.brought_in
        if misses is not None:
            self._aside.step(misses, issued - self._prefetches_before, fell_short=ledger.fell_short)
        self._prefetches_before, ledger.fell_short = issued, False

    def _set_aside(self) -> Iterator[None]:
        wanted, pool = self.wanted(), self._cache.ledger.pool
        for reserve in range(pool.number(Use.COLD, Use.COOLING, Use.FREE), wanted.reserve, _EVICTIONS):
            self._executor.handle([Provide(0, min(reserve + _EVICTIONS, wanted.reserve))])
            yield
        for landing in range(pool.number(Use.HANDED), wanted.landing, _EVICTIONS):
            self._executor.handle([Provide(min(landing + _EVICTIONS, wanted.landing), wanted.reserve)])
            yield
        self._executor.handle([wanted])
