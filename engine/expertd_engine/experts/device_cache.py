"""The thin shell around a device's residency ledger: what the engine thread does around each launch.

A step is one launch that nobody interrupts. Before it the boundary's changes are sent; while it runs the ledger learns
what the step before it met, chooses who gives way, and prefetches; what that changes waits for the next boundary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from expertd_engine.errors import EngineError, ResourceError
from expertd_engine.experts.accounting import Stalls
from expertd_engine.experts.device_copies import DeviceCopies, measure_link
from expertd_engine.experts.device_digest import Digest
from expertd_engine.experts.device_events import (
    HIT,
    READ,
    Adopt,
    Confine,
    Cooled,
    DeviceEvent,
    Fill,
    Keep,
    Lend,
    LetGo,
    Provide,
    Seen,
)
from expertd_engine.experts.device_executor import Executor
from expertd_engine.experts.device_hints import payoff_of
from expertd_engine.experts.device_host import HostTier
from expertd_engine.experts.device_host_compute import HostCompute
from expertd_engine.experts.device_layout import TableLayout
from expertd_engine.experts.device_ledger import DeviceLedger
from expertd_engine.experts.device_pool import Use
from expertd_engine.experts.device_publication import Boundary
from expertd_engine.experts.device_report import Launch, count_report, num_misses
from expertd_engine.experts.device_spill import SpilledHost
from expertd_engine.experts.device_staging import Fetching, Residents, Ring, Staging, plan_ring
from expertd_engine.experts.device_streams import Device, Mark
from expertd_engine.experts.device_table import DeviceTable
from expertd_engine.experts.events import ExpertId, Predict, Remember, SetBudget, Tick
from expertd_engine.experts.lookahead import Lookahead, NoLookahead
from expertd_engine.experts.payoff import PayOff
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.sequence_stats import ExpertCounts
from expertd_engine.snapshot import Tiers

logger = logging.getLogger(__name__)

_LANDING_MOST = 4096
_MARGIN = 2
"""Layers that are too near for a copy."""


class DeviceCache:
    """The experts of a store in a device's slots over `host`. `report_rows`: distinct experts of a layer in a step.

    Raises ResourceError when the device has no room for the budget's slots.
    """

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
        self.routes: Callable[[int], Sequence[int]] = _unknown
        """What a layer of the running step routes to, where that is known to the host before it has ended."""
        self._asked: Lookahead = lookahead
        self._heard: Callable[[int], Sequence[int]] = _unknown
        """Of lookahead and routes, by the running step: of neither while hints do not pay, as if nobody gave any."""
        self.record_bytes = [index.record_bytes(layer) for layer in range(len(index.layers))]
        experts = max(ledger.experts_per_layer)
        landing = 1 << min(ledger.num_slots, _LANDING_MOST).bit_length()
        layout = TableLayout(len(self.record_bytes), experts, ledger.num_slots, landing)
        self.table = DeviceTable(layout, report_rows, device)
        self._executor = Executor(device, host, ledger, self.table, self.record_bytes)
        self.slab, self.publication, self.copies = (
            self._executor.slab, self._executor.publication, self._executor.copies
        )  # fmt: skip
        self.link = self._executor.link
        self.period, self._experts = layout.layers * experts, experts
        self._step = self._layers_known = 0
        self._scan = self._staged_words = False
        self._scanned = ExpertCounts()
        self.fetched: set[tuple[int, int]] = set()
        """Experts that the running step had to have brought in, where it waited for that."""
        self.layer_waits = 0
        """Times that a step waited at a layer to be told what it lacks."""
        self.pulse: Callable[[], None] = _nobody
        """Called at the end of each step."""
        self._boundary = Boundary({}, ())
        self._before: Mark = device.compute.mark()
        self._digest = Digest(self, self._executor)
        self._last: Launch | None = None
        self._executor.begin()
        self.link_bytes_per_s = math.inf if device.shares_memory else self._measure_link()
        self.cpu_bytes_per_s = 0.0
        """Of records that the processor computes; 0 where that was not measured."""

    # ------------------------------------------------------------ a step

    def begin_step(self, token_ids: Sequence[int], scan: bool = False) -> None:
        """A new step over these tokens begins. `scan`: of prompt tokens alone (law 5)."""
        self._step += 1
        self._ask()
        self._scan, self._layers_known, self._scanned = scan, 0, ExpertCounts()
        self.fetched.clear()
        hints = tuple(self._asked.begin_step(self._step, token_ids))
        self._executor.pump([Predict(hints)] if hints else [])

    def before_launch(self) -> None:
        """Send what the launch applies first. The launch before the last has ended."""
        if self._step == 1:
            self._executor.handle([self._digest.wanted()])
        self._digest.finish()
        self._boundary = self.publication.boundary()
        self.table.stage(self._boundary.words)
        self._before = self.device.compute.mark()
        self._staged_words = True
        if self.computing is not None:
            self.computing.begin_step()

    def after_launch(self, whole: bool = True) -> None:
        """The launch is under way: have its report sent, and take in what the one before met."""
        self.table.copy_out()
        self._staged_words = False
        position, ended = self._step * self.period, self.device.compute.mark()
        launch = Launch(self._step, position, self._experts, self.table.turn, self._scan, whole, ended)
        self.copies.after(self._before)
        self._executor.pump([Cooled(self._boundary.retired)])
        self._digest.begin(launch)
        self._last = launch

    def poll(self) -> None:
        """Again and again while a launch runs: take in complete copies, what is foreseen as layers route, and some of
        what the launch before met.
        """
        events: list[DeviceEvent] = []
        known = self.table.layers_known
        if self._heard is not _unknown and known > self._layers_known:
            self.ledger.foreseen_until(self._step * self.period + self._worth_copying(known) * self._experts)
            # The newest layer says what the others would have said, for layers that have not run yet.
            hints = tuple(self._asked.routed(self._step, known - 1, self._heard(known - 1)))
            events += [Predict(hints)] if hints else []
            self._layers_known = known
        self._executor.pump(events)
        self._digest.go_on()
        self.copies.begin()  # what the digest has just asked for need not wait for the next poll
        self.meanwhile()

    @property
    def payoff(self) -> PayOff | None:
        """Whether hints are taken now; None where nobody foresees."""
        return payoff_of(self.lookahead)

    def _ask(self) -> None:
        """Settle whom the step that begins asks for hints, and whether it hears of its routes."""
        pays = (payoff := self.payoff) is None or payoff.is_on
        self._asked = self.lookahead if pays else _UNFORESEEN
        self._heard = self.routes if self.foresees else _unknown

    def _worth_copying(self, known: int) -> int:
        """The first layer for which a copy begun now is announced early enough; those before read what they lack."""
        return known + _MARGIN + self.copies.begun // 2

    def end_step(self) -> ExpertCounts:
        """The launch has ended: what it met. The ledger learns of it while the next one runs."""
        self.pulse()
        if self._last is None or self._last.step != self._step:
            return self._scanned
        self._last.ended.wait()
        computed_s = 0.0 if self.computing is None else self.computing.end_step()
        report = self.table.report(self._last.turn)
        counts = count_report(report, self.record_bytes, self.link_bytes_per_s, self.shared_bytes, computed_s)
        self.stalls.add("link_estimated", counts.stall_s - computed_s)
        self.stalls.add("host_compute", computed_s)
        self.stalls.end_step()
        return counts

    def abandon_step(self) -> None:
        """The step failed, wherever it was. What was sent for it is applied, nothing that it landed is trusted."""
        if self._staged_words:
            self.device.compute.mark().wait()
            if self.table.layers_known == 0:  # then nothing has landed, and nobody knows whether it was applied
                self.device.compute.run(self.table.apply)
            self.after_launch(whole=False)
        if self.computing is not None:
            self.device.compute.mark().wait()  # what runs still may wait for an answer
            self.computing.end_step()
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

    # ------------------------------------------------------------ between steps

    def settle(self) -> None:
        """No step is running: take in all there is to know, and have all that was collected applied, now."""
        self._digest.catch_up()
        self._executor.flush()
        self.device.compute.mark().wait()

    def stage(self, *, held_alone: bool = False) -> Staging:
        """For a step of many rows, launched layer by layer: its experts, streamed through a few slots. Call it between
        `begin_step` and the first of its launches, for a `with` block around them; then `scanned`. `held_alone`: no row
        goes to any expert but those that virtual mode holds.

        Raises EngineError when there is no slot to stream through.
        """
        self._digest.catch_up()
        if held_alone:
            self._executor.flush()
            return Residents(self, (), Ring(0, 1))
        ring = plan_ring(self._digest.movable, max(self.record_bytes))
        while not self.device.shares_memory and not self._borrow(ring.slots):
            kept = len(self.ledger.kept)
            self.meanwhile()  # of those kept, some may have been replaced
            if self.ledger.is_idle() and len(self.ledger.kept) == kept:
                raise EngineError(f"no slot of {self.ledger.pool.limit} can be lent to a prompt, and no copy frees one")
            self._executor.drain()  # every slot is being copied into
        lent = self._executor.take_lent()
        return Fetching(self, lent, ring, keep=not self._scan) if self.by_layer else Staging(self, lent, ring)

    @property
    def by_layer(self) -> bool:
        """Whether experts cannot be read at home: then every step is staged, and waits once a layer."""
        return not (self.host.complete and self.host.pinned)

    def adopt(self, expert: ExpertId, slot: int) -> None:
        """A staged step has done with the record that was streamed into a lent slot; it may stay."""
        self._executor.handle([Adopt(expert, slot)])
        if self.ledger.resident_slots(expert.layer)[expert.expert] == slot:
            self.publication.copied(expert, slot)

    def scanned(self, pairs: Sequence[Sequence[int]]) -> None:
        """A staged step's launches have ended; `pairs[l][e]` pairs chose expert e of layer l."""
        seen = [self._staged(layer, chosen) for layer, chosen in enumerate(pairs)]
        misses = [num_misses(one) for one in seen]
        self._executor.pump([*seen, Tick((self._step + 1) * self.period)])
        self._executor.handle([self._digest.wanted()])
        nbytes = sum(count * size for count, size in zip(misses, self.record_bytes, strict=True))
        lookups = sum(len(one.experts) for one in seen)
        self.fetched.clear()
        self._scanned = ExpertCounts(lookups - sum(misses), 0, sum(misses), nbytes, 0.0)

    def fill(self, experts: Iterable[ExpertId] = ()) -> None:
        """Bring these into empty slots, then all others in turns of one a layer, until slots or experts are used up.

        No step is running. Waits until all are there.
        """
        if self.by_layer:
            return  # they come as steps ask for them
        self._digest.catch_up()
        self._executor.handle([Provide(0, 0, still=True)])
        self._executor.flush()
        counts = self.ledger.experts_per_layer
        others = [ExpertId(layer, e) for e in range(self._experts) for layer, count in enumerate(counts) if e < count]
        self._executor.handle([Fill([*experts, *others])])
        self._executor.drain()
        self.settle()

    def recall(self, remember: Remember) -> None:
        """Take up what an earlier engine left, the best first. No step has run. Waits until all are there."""
        self._executor.handle([remember])
        self.fill(remember.residents)

    def set_budget(self, budget_bytes: int) -> None:
        """Change the budget for slots; no step is running. Raises BudgetError outside what is allowed, and nothing
        changes; ResourceError when the device has no room, and the budget is then what it has room for.
        """
        if self.device.shares_memory:
            raise ResourceError("this device shares the host's memory: it has no expert slots of its own to budget")
        self.ledger.check_budget(budget_bytes)
        self.resizing()
        self.settle()
        self._executor.drain()
        slots = self.ledger.slots_within(budget_bytes)
        self._executor.handle([Confine(self.slab.kept(slots))])
        self.settle()
        try:
            self._executor.resize(slots)
        except ResourceError:
            self._executor.handle([SetBudget(self.slab.bytes)])
            logger.warning("the expert budget is %d bytes now: the device has no room for more", self.slab.bytes)
            raise
        self._executor.handle([SetBudget(budget_bytes)])
        self.settle()
        self.resized()

    def tiers(self) -> Tiers:
        """Where bytes are now."""
        return Tiers(
            device_bytes=self.slab.bytes,
            slots=self.slab.slots,
            resident=sum(self.ledger.residents_by_layer()),
            set_aside=self.ledger.pool.number(Use.COLD, Use.COOLING, Use.HANDED, Use.LENT),
            host_bytes=self.host.bytes,
            host_pinned=self.host.pinned,
            link_bytes=asdict(self.link),
            link_bytes_per_s=self.link_bytes_per_s,
            copies=self.copies.depth(),
            duplicates=self.ledger.duplicates,
            layer_waits=self.layer_waits,
            misses="link" if self.computing is None else "both" if self.computing.lands else "cpu",
            cpu_bytes_per_s=self.cpu_bytes_per_s,
            computed=0 if self.computing is None else self.computing.computed,
            computed_bytes=0 if self.computing is None else self.computing.computed_bytes,
        )

    def close(self) -> None:
        """Wait for the device and unpin the host's memory."""
        self._executor.drain()
        self.device.compute.mark().wait()
        if self.computing is not None:
            self.computing.close()
        self.host.close()

    # ------------------------------------------------------------ what virtual mode keeps

    def keep(self, event: Keep | LetGo) -> None:
        """Have an expert kept, or let go."""
        self._executor.handle([event])

    def take_kept(self) -> list[ExpertId]:
        """Experts that are kept since this was asked last."""
        kept, self._executor.kept = self._executor.kept, []
        return kept

    def bring(self) -> None:
        """No step is running: have slots for the wanted, whoever else they were set aside for, and bring them in."""
        self._digest.catch_up()
        self._executor.handle([Provide(0, len(self.ledger.wanted), still=True)])
        self._executor.flush()
        self._executor.drain()
        self.settle()

    # ------------------------------------------------------------ what the ledger is told

    def _borrow(self, slots: int) -> bool:
        """Whether there are any to stream through, `slots` at most, or none are needed; no step is running."""
        wanted = self._digest.wanted(slots)
        self._executor.handle([wanted])
        self._executor.flush(Lend(min(slots, wanted.reserve)))
        all_there = sum(self.ledger.residents_by_layer()) == sum(self.ledger.experts_per_layer)
        return bool(self._executor.lent) or all_there

    def _staged(self, layer: int, chosen: Sequence[int]) -> Seen:
        experts = [expert for expert, pairs in enumerate(chosen) if pairs]
        slots, homes_are_good = self.ledger.resident_slots(layer), self.device.shares_memory
        met = [homes_are_good or (slots[expert] >= 0 and (layer, expert) not in self.fetched) for expert in experts]
        sources = [HIT if hit else READ for hit in met]
        position = self._step * self.period + layer * self._experts
        return Seen(layer, experts, sources, [chosen[expert] for expert in experts], position, self._scan)

    @property
    def foresees(self) -> bool:
        """Whether somebody is asked for hints in this step."""
        return self._asked.exactness != "none"

    def foreseen_late(self, seen: Seen, step: int) -> list[DeviceEvent]:
        """Where nobody knows routes while a step runs, a lookahead hears of them when it has ended."""
        if self._heard is not _unknown:
            return []
        hints = tuple(self._asked.routed(step, seen.layer, seen.experts))
        return [Predict(hints)] if hints else []

    def shared_bytes(self, layer: int, missing: int) -> int:
        """That cross the link of an expert of which the processor computes a part, if so many are missing."""
        return 0 if self.computing is None else self.computing.shared_bytes(layer, missing)

    def _measure_link(self) -> float:
        return measure_link(self.device, self.slab.address(0), self.host.address, self.record_bytes[0])


def _nobody() -> None:
    return None


def _unknown(layer: int) -> Sequence[int]:
    return ()


_UNFORESEEN = NoLookahead()
