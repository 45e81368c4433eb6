"""Carries out what a device's ledger says: collects what is to be published, submits copies, moves records.

Owner: the engine thread. The ledger decides, the publication says when, the copies lane moves bytes; here they are only
connected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from expertd_engine.experts.device_copies import DeviceCopies
from expertd_engine.experts.device_events import (
    READ,
    Confine,
    Cooled,
    DeviceEvent,
    DeviceInstruction,
    Fetched,
    Fetching,
    Hand,
    Kept,
    Landed,
    Lent,
    LetGo,
    Met,
    Move,
    PassOn,
    Recall,
    Retire,
    Seen,
)
from expertd_engine.experts.device_host import HostTier
from expertd_engine.experts.device_layout import HOME
from expertd_engine.experts.device_ledger import DeviceLedger
from expertd_engine.experts.device_publication import Publication
from expertd_engine.experts.device_report import num_misses
from expertd_engine.experts.device_slab import DeviceSlab
from expertd_engine.experts.device_spill import SpilledHost
from expertd_engine.experts.device_streams import AddressMove, Device
from expertd_engine.experts.device_table import DeviceTable
from expertd_engine.experts.device_tiers import LinkBytes
from expertd_engine.experts.events import Cancel, ExpertId, Load, Priority

GIVEN_AT_ONCE = 16
"""Moves of a fetch that the copies lane is given before other work goes on."""


class Executor:
    """`record_bytes[l]` is the length of a record of MoE layer l in bytes."""

    def __init__(
        self,
        device: Device,
        host: HostTier | SpilledHost,
        ledger: DeviceLedger,
        table: DeviceTable,
        record_bytes: Sequence[int],
    ) -> None:
        self.slab = DeviceSlab(ledger.plan, device)
        self.publication = Publication(table.layout, host.home)
        self.copies = DeviceCopies(device, table, max(record_bytes))
        self.link = LinkBytes()
        self.lent: list[int] = []
        """Slots that were lent and not yet taken."""
        self.kept: list[ExpertId] = []
        """Experts that are kept since somebody last took note."""
        self._homes: list[list[int]] = []
        """Addresses by layer and expert."""
        self._fetching: dict[int, Fetching] = {}
        """By number, those under way."""
        self._device, self._host, self._ledger, self._table = device, host, ledger, table
        self._record_bytes = record_bytes
        ledger.prefetch_at_most(self.copies.ahead)

    def begin(self) -> None:
        """Nobody is resident, and the slots of the budget are there. Raises ResourceError when they cannot be."""
        for layer, count in enumerate(self._ledger.experts_per_layer):
            experts = [ExpertId(layer, expert) for expert in range(count)]
            self._homes.append([self._host.home(expert) & ~HOME for expert in experts])
            for expert in experts:
                self.publication.send_home(expert)
        if self._device.shares_memory:
            self.handle([Confine(0)])
        else:
            self.resize(self._ledger.slots_within(self._ledger.budget_bytes))
        self.flush()
        self._device.compute.mark().wait()

    def pump(self, events: list[DeviceEvent], landed: Sequence[Landed] = ()) -> None:
        """Tell the ledger of copies that are complete and of these events, and begin what copies come next."""
        for load, loaded in self.copies.complete():
            self.publication.copied(load.expert, load.slot)
            events.append(loaded)
            if load.priority is Priority.PREFETCH:
                self.link.prefetched += self._record_bytes[load.expert.layer]
            elif load.expert in self._ledger.wanted:
                self.link.held += self._record_bytes[load.expert.layer]
            else:
                self.link.filled += self._record_bytes[load.expert.layer]
        for number in self.copies.fetched():
            fetched = self._fetching.pop(number)
            for expert, slot in zip(fetched.experts, fetched.slots, strict=True):
                self.publication.copied(expert, slot)
                self.link.prefetched += self._record_bytes[expert.layer]
            events.append(Fetched(number))
        if events:
            self.handle(events, landed)
        self.copies.begin()
        self.copies.give(GIVEN_AT_ONCE)

    def handle(self, events: Sequence[DeviceEvent], landed: Sequence[Landed] = ()) -> None:
        """Tell the ledger, and do as it says. `landed`: those among the events."""
        cancelled: list[DeviceEvent] = []
        instructions = self._ledger.handle_all(events)
        for event in events:
            if isinstance(event, LetGo):
                self.publication.hold(event.expert, False)
        for one in landed:
            lies_in = self._ledger.resident_slots(one.expert.layer)[one.expert.expert]
            self.publication.landed(one.expert, one.slot, lies_in)
        for instruction in instructions:
            self._execute(instruction, cancelled)
        if cancelled:
            self.handle(cancelled)

    def _execute(self, instruction: DeviceInstruction, cancelled: list[DeviceEvent]) -> None:
        match instruction:
            case Retire(slot, expert):
                lies_in = self._ledger.resident_slots(expert.layer)[expert.expert]
                self.publication.retire(slot, expert, lies_in)
            case Hand(slot):
                self.publication.hand(slot)
            case Load(_, expert, slot, _):
                nbytes = self._record_bytes[expert.layer]
                self.copies.submit(instruction, self.slab.address(slot), self._host.home(expert) & ~HOME, nbytes)
            case Cancel(load_id):
                taken_back = self.copies.cancel(load_id)
                cancelled += [] if taken_back is None else [taken_back]
            case PassOn(experts):
                for expert in experts:
                    self.publication.send_home(expert)
            case Fetching():
                self._fetch(instruction)
            case Recall(slots):
                self.publication.recall(slots)
            case Kept(expert):
                self.publication.hold(expert, True)
                self.kept.append(expert)
            case Lent(slots):
                self.lent = list(slots)
            case Move(expert, origin, slot):
                nbytes = self._record_bytes[expert.layer]
                self._device.compute.copy([(self.slab.view(slot, nbytes), self.slab.view(origin, nbytes))])
                self.publication.moved(expert, slot)

    def _fetch(self, fetching: Fetching) -> None:
        self.publication.fetch(fetching.experts, fetching.slots)
        self._fetching[fetching.number] = fetching
        sizes = [self._record_bytes[layer] for layer, _ in fetching.experts]
        self.copies.fetch(fetching.number, self._moves(fetching), sizes)

    def _moves(self, fetching: Fetching) -> Iterator[AddressMove]:
        for (layer, expert), slot in zip(fetching.experts, fetching.slots, strict=True):
            yield self.slab.address(slot), self._homes[layer][expert], self._record_bytes[layer]
            yield self._table.complete(slot)

    def flush(self, *events: DeviceEvent) -> None:
        """Have all that was collected applied before whatever is given to the compute lane from now on, then tell of
        these events.
        """
        boundary = self.publication.boundary(awaited=True)
        self._table.stage(boundary.words)
        self.copies.after(self._table.apply_now())
        self.handle([Cooled(boundary.retired), *events])

    def drain(self) -> None:
        """Until no copy is under way."""
        self.pump([])
        while not self._ledger.is_idle():
            self.copies.wait()
            self.pump([])

    def resize(self, slots: int) -> None:
        """Have memory for so many slots; those that it takes away are no one's. Raises ResourceError."""
        first = self.slab.kept(slots)
        self.slab.resize(slots)
        for slot in range(first, slots):
            self.publication.place_slot(slot, self.slab.address(slot))

    def take_lent(self) -> list[int]:
        """The slots that were lent, to be used now."""
        lent, self.lent = self.lent, []
        return lent

    def count_read(self, met: Met) -> None:
        """As `count_met`, of all layers."""
        read = met.layers[met.sources == READ].tolist()
        nbytes = sum(self._record_bytes[layer] for layer in read)
        self.link.read += nbytes
        self.copies.read_bytes += nbytes

    def count_met(self, seen: Seen) -> None:
        """Bytes that a launch read over the link itself."""
        if not any(seen.sources):
            return  # hits alone
        nbytes, misses, read = self._record_bytes[seen.layer], num_misses(seen), seen.sources.count(READ)
        self.link.read += read * nbytes
        self.link.landed += (misses - read) * nbytes
        self.link.shared += seen.shared_bytes
        self.copies.read_bytes += misses * nbytes + seen.shared_bytes
