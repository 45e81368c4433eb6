"""The thin shell around a device's residency ledger: what the engine thread does around each launch.

A step is one launch that nobody interrupts. Before it the boundary's changes are sent; while it runs the ledger learns
what the step before it met, chooses who gives way, and prefetches; what that changes waits for the next boundary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.accounting import Stalls
from expertd_engine.experts.device_copies import DeviceCopies, measure_link
from expertd_engine.experts.device_digest import Digest
from expertd_engine.experts.device_events import (
    Cooled,
    DeviceEvent,
    Seen,
)
from expertd_engine.experts.device_executor import Executor
from expertd_engine.experts.device_hints import payoff_of
from expertd_engine.experts.device_host import HostTier
from expertd_engine.experts.device_host_compute import HostCompute
from expertd_engine.experts.device_layout import TableLayout
from expertd_engine.experts.device_ledger import DeviceLedger
from expertd_engine.experts.device_listening import Heard, Listener, Listening, unheard
from expertd_engine.experts.device_plans import NOTHING, Plans, nothing_known
from expertd_engine.experts.device_publication import Boundary
from expertd_engine.experts.device_report import Launch, count_report
from expertd_engine.experts.device_sharing import Sharing
from expertd_engine.experts.device_spill import SpilledHost
from expertd_engine.experts.device_streams import Device, Mark
from expertd_engine.experts.device_table import DeviceTable
from expertd_engine.experts.events import Predict, Tick
from expertd_engine.experts.lead import Lead
from expertd_engine.experts.lookahead import Lookahead, NoLookahead
from expertd_engine.experts.payoff import PayOff
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.sequence_stats import ExpertCounts

_LANDING_MOST = 4096
_MARGIN = 2
"""Layers that are too near for a copy."""


class DeviceSteps:
    """Parameters as of `DeviceCache`."""

    def __init__(
        self,
        index: StoreIndex,
        device: Device,
        host: HostTier | SpilledHost,
        ledger: DeviceLedger,
        lookahead: Lookahead,
        report_rows: int,
    ) -> None:
        self.device, self.host, self.ledger, self.lookahead = device, host, ledger, lookahead
        self.stalls = Stalls(("link_estimated", "host_compute"))
        self.computing: HostCompute | None = None
        """Who computes what a step misses, or a part of it; None: the step itself, over the link."""
        self.resizing: Callable[[], None] = _nobody
        """Called before the budget changes: whoever keeps experts lets them go."""
        self.resized: Callable[[], None] = _nobody
        """Called when the budget has changed."""
        self.meanwhile: Callable[[], None] = _nobody
        """Called again and again while a launch runs, for what may wait until there is time."""
        self.routes: Callable[[], Heard] = _nothing_heard
        """Asked when a step begins, for who will say of its layers what they have routed to."""
        self.foreknown: Callable[[], NDArray[np.int64]] = nothing_known
        """The distinct experts of the step that begins, layer by layer, where all of them are known by then; else
        nothing. Expert e of layer l is number `first[l] + e` of all."""
        self._asked: Lookahead = lookahead
        self._heard: Heard = unheard
        """Of lookahead and routes, by the running step: of neither while hints do not pay, as if nobody gave any."""
        self.record_bytes = [index.record_bytes(layer) for layer in range(len(index.layers))]
        experts = max(ledger.experts_per_layer)
        landing = 1 << min(ledger.num_slots, _LANDING_MOST).bit_length()
        layout = TableLayout(len(self.record_bytes), experts, ledger.num_slots, landing)
        self.table = DeviceTable(layout, report_rows, device)
        self._executor = executor = Executor(device, host, ledger, self.table, self.record_bytes)
        self.slab, self.publication = executor.slab, executor.publication
        self.copies, self.link = executor.copies, executor.link
        self.period, self._experts = layout.layers * experts, experts
        self._step = 0
        self._scan = self._staged_words = False
        self._scanned = ExpertCounts()
        self._known = NOTHING
        """Of the step that begins, where those of it that are absent are fetched."""
        self.fetched: set[tuple[int, int]] = set()
        """Experts that the running step had to have brought in, where it waited for that."""
        self.layer_waits = 0
        """Times that a step waited at a layer to be told what it lacks."""
        self.pulse: Callable[[], None] = _nobody
        """Called at the end of each step."""
        self._boundary = Boundary({}, ())
        self._before: Mark = device.compute.mark()
        self._digest = Digest(self, self._executor)
        self.plans = Plans(self, self._executor, self._digest)
        self._last: Launch | None = None
        self._running: deque[Launch] = deque()
        """Those of which `end_step` has not been called, at most two."""
        self._listener = Listener(self.table)
        self.lead = Lead(layout.layers)
        self._executor.begin()
        self.link_bytes_per_s = math.inf if device.shares_memory else self._measure_link()
        self.cpu_bytes_per_s = 0.0
        """Of records that the processor computes; 0 where that was not measured."""

    # ------------------------------------------------------------ a step

    def begin_step(self, token_ids: Sequence[int], scan: bool = False) -> None:
        """A new step over these tokens begins. `scan`: of prompt tokens alone (law 5). Of one that is launched behind
        another which runs still (`may_go_ahead`) no token is known yet."""
        self._step += 1
        self._ask()
        self._scan, self._scanned = scan, ExpertCounts()
        self.fetched.clear()
        may_fetch = not scan and self.foresees and self.plans.fetches  # law 5
        self._known = self.foreknown() if may_fetch else NOTHING
        if len(self._known):
            return  # its plan begins copies before anything else
        hints = tuple(self._asked.begin_step(self._step, token_ids))
        self._executor.pump([Predict(hints)] if hints else [])

    def before_launch(self, *, may_ask: bool = True) -> bool:
        """Send what the launch applies first. The launch before the last has ended. Whether it is to be the program
        that asks the processor; `may_ask`: there is one."""
        if self._step == 1:
            self._executor.handle([self._digest.wanted()])
        if len(self._known):
            self._heard = unheard  # there is nothing left to foresee
            self.plans.fetch(self._known, NOTHING if self._last is None else self._last.known)
        self._digest.finish()
        self._boundary = self.publication.boundary()
        launch = self.table.stage(self._boundary.words)
        self._listener.begin(Listening(self._step, launch, self._asked, self._heard), behind=bool(self._running))
        self._before = self.device.compute.mark()
        self._staged_words = True
        return self.computing is not None and self.computing.begin_step(may_ask=may_ask)

    def after_launch(self, whole: bool = True) -> Mark:
        """The launch is under way: have its report sent, and take in what the one before met. By the mark all that was
        given to the device for it has ended."""
        self.table.copy_out()
        self._staged_words = False
        position, ended = self._step * self.period, self.device.compute.mark()
        self.table.applied(ended)
        turn = self.table.turn
        launch = Launch(self._step, position, self._experts, turn, self._scan, whole, ended, self._known)
        if self.computing is not None:
            self.computing.launched()
        self.copies.after(self._before)
        self._executor.pump([Cooled(self._boundary.retired)])
        self._digest.begin(launch)
        self._last = launch
        self._running.append(launch)
        return ended

    @property
    def may_go_ahead(self) -> bool:
        """Whether the next step may be launched behind the one that runs: nobody has to know its tokens first."""
        return self.foreknown is nothing_known and not self.by_layer

    @property
    def nears_end(self) -> bool:
        """Whether it is time to launch the next step behind the one launched last: which then has taken in all that the
        host wrote for it."""
        listener = self._listener
        return listener.has_begun and listener.layers >= max(1, self.table.layout.layers - self.lead.layers)

    def poll(self) -> None:
        """Again and again while a launch runs: take in complete copies, what is foreseen as layers route, and some of
        what the launch before met.
        """
        events: list[DeviceEvent] = []
        if (heard := self._listener.hear()) is not None:
            launch, hints = heard
            first = self._worth_copying(launch.layers)
            self.ledger.foreseen_until(launch.step * self.period + first * self._experts)
            events += [Predict(tuple(hints))] if hints else []
        self._executor.pump(events)
        self._digest.go_on()
        self.copies.begin()  # what the digest has just asked for need not wait for the next poll
        self.meanwhile()

    @property
    def payoff(self) -> PayOff | None:
        """Whether hints are taken now; None where nobody foresees."""
        return payoff_of(self.lookahead)

    def begin_timed(self, rows: int | None, *, ahead: bool = False) -> None:
        """A step of so many decoding rows is about to begin; None: one of another kind. `ahead`: behind another that
        runs still. Of two things that are tried in time one waits for the other."""
        if (payoff := self.payoff) is not None:
            payoff.begin_step(rows, ahead=ahead)
        if (sharing := self.sharing) is not None:
            sharing.begin_timed(None if payoff is not None and payoff.is_timed else rows, ahead=ahead)

    def end_timed(self, seconds: float | None, missed: int) -> None:
        """The first that was begun has ended, well, and so many of its lookups missed. None: for nobody."""
        if (payoff := self.payoff) is not None:
            payoff.end_step(seconds)
        if (sharing := self.sharing) is not None:
            sharing.end_timed(seconds, missed)

    @property
    def sharing(self) -> Sharing | None:
        """What is left to the processor; None where nothing ever is."""
        return None if self.computing is None else self.computing.sharing

    def _ask(self) -> None:
        """Settle whom the step that begins asks for hints, and whether it hears of its routes."""
        pays = (payoff := self.payoff) is None or payoff.is_on
        self._asked = self.lookahead if pays else _UNFORESEEN
        self._heard = self.routes() if self.foresees else unheard

    def _worth_copying(self, known: int) -> int:
        """The first layer for which a copy begun now is announced early enough; those before read what they lack."""
        return known + _MARGIN + self.copies.begun // 2

    def end_step(self) -> ExpertCounts:
        """The first launch that runs has ended: what it met. The ledger learns of it while the next one runs."""
        self.pulse()
        if not self._running:
            return self._scanned
        launch = self._running.popleft()
        launch.ended.wait()
        computed_s = 0.0 if self.computing is None else self.computing.end_step()
        report = self.table.report(launch.turn)
        counts = count_report(report, self.record_bytes, self.link_bytes_per_s, self.shared_bytes, computed_s)
        self.stalls.add("link_estimated", counts.stall_s - computed_s)
        self.stalls.add("host_compute", computed_s)
        self.stalls.end_step()
        return counts

    def abandon_step(self) -> None:
        """The step failed, wherever it was, and with it the one behind it. What was sent for it is applied, nothing
        that it landed is trusted."""
        self.copies.give_all()  # what was launched may wait for them
        self.device.compute.mark().wait()  # then inputs may be written again, and memory be taken away
        if self._staged_words:
            if not self._listener.has_begun:  # then nothing has landed, and nobody knows whether it was applied
                self.table.apply_now()
            self.after_launch(whole=False)
        self._running.clear()
        self._listener.forget()
        if self.computing is not None:
            self.computing.give_up()
        self._executor.handle([Tick((self._step + 1) * self.period)])

    @property
    def transfers(self) -> DeviceCopies:
        """Statistics of copies."""
        return self.copies

    def count_staged(self, nbytes: int) -> None:
        """So many bytes are being streamed through."""
        self.link.staged += nbytes
        self.copies.read_bytes += nbytes

    def pump(self) -> None:
        """No step is running: take in all there is to know, without waiting."""
        if self._digest.is_ready:
            self._digest.catch_up()
        self._executor.pump([])

    @property
    def by_layer(self) -> bool:
        """Whether experts cannot be read at home: then every step is staged, and waits once a layer."""
        return not (self.host.complete and self.host.pinned)

    # ------------------------------------------------------------ what the ledger is told

    @property
    def foresees(self) -> bool:
        """Whether somebody is asked for hints in this step."""
        return self._asked.exactness != "none"

    def foreseen_late(self, seen: Seen, step: int) -> list[DeviceEvent]:
        """Where nobody knows routes while a step runs, a lookahead hears of them when it has ended."""
        if self._heard is not unheard:
            return []
        hints = tuple(self._asked.routed(step, seen.layer, seen.experts))
        return [Predict(hints)] if hints else []

    def shared_bytes(self, layer: int, cut: int) -> int:
        """That cross the link of an expert of which the processor computes the neurons from `cut` on."""
        return 0 if self.computing is None else self.computing.shared_bytes(layer, cut)

    def read_beside(self, nbytes: int) -> None:
        """Have the link carry so many bytes, without waiting; nothing is resident yet."""
        record = self.record_bytes[0]
        self.device.copies.move([(self.slab.address(0), self.host.address, record)] * max(1, nbytes // record))

    def _measure_link(self) -> float:
        return measure_link(self.device, self.slab.address(0), self.host.address, self.record_bytes[0])


def _nobody() -> None:
    return None


def _nothing_heard() -> Heard:
    return unheard


_UNFORESEEN = NoLookahead()
