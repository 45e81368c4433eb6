"""A device's experts between steps: who is brought in and streamed through, what is kept, and what a budget changes.

Owner: the engine thread. Around launches it is `DeviceSteps`; the ledger decides, the executor carries out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from expertd_engine.errors import EngineError, ResourceError
from expertd_engine.experts.device_events import (
    HIT,
    READ,
    Adopt,
    Confine,
    Fill,
    Keep,
    Lend,
    LetGo,
    Provide,
    Seen,
)
from expertd_engine.experts.device_pool import Use
from expertd_engine.experts.device_report import num_misses
from expertd_engine.experts.device_staging import Fetching, Residents, Ring, Staging, plan_ring
from expertd_engine.experts.device_steps import DeviceSteps
from expertd_engine.experts.events import ExpertId, Remember, SetBudget, Tick
from expertd_engine.sequence_stats import ExpertCounts
from expertd_engine.snapshot import Tiers

logger = logging.getLogger(__name__)


class DeviceCache(DeviceSteps):
    """The experts of a store in a device's slots over `host`. `report_rows`: distinct experts of a layer in a step.

    Raises ResourceError when the device has no room for the budget's slots.
    """

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
        if self.sharing is not None:
            self.sharing.payoff.begin_anew()
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
            shared=None if self.sharing is None else self.sharing.as_status(),
        )

    def close(self) -> None:
        """Wait for the device and unpin the host's memory."""
        self._executor.drain()
        self.device.compute.mark().wait()
        if self.computing is not None:
            self.computing.close()
        self.host.close()

    # ------------------------------------------------------------ what virtual mode keeps

    def keep(self, *events: Keep | LetGo) -> None:
        """Have experts kept, or let go."""
        self._executor.handle(events)

    def take_kept(self) -> list[ExpertId]:
        """Experts that are kept since this was asked last."""
        kept, self._executor.kept = self._executor.kept, []
        return kept

    def bring(self) -> None:
        """No step is running: have slots for the wanted, whoever else they were set aside for, and bring them in."""
        self._digest.catch_up()
        self._executor.drain()  # what is on its way cannot give way
        self._executor.handle([Provide(0, len(self.ledger.wanted), still=True)])
        self._executor.flush()
        self._executor.drain()
        self.settle()

    # ------------------------------------------------------------ prompts

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
