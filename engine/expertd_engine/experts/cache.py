"""The thin shell around the residency ledger: carries out its instructions and waits for what a step needs.

Owner: the engine thread. The ledger decides, transfer threads move bytes, the slab holds them; this module only
connects the three and measures how long the step waited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Generator, Sequence
from dataclasses import dataclass

from expertd_engine.errors import ExpertdError
from expertd_engine.experts.events import (
    Abort,
    Cancel,
    Demand,
    Denied,
    Drop,
    Event,
    ExpertId,
    Granted,
    Hint,
    Instruction,
    Load,
    Predict,
    Promote,
    Release,
    SetBudget,
    Tick,
)
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.lookahead import Lookahead
from expertd_engine.experts.slab import Slab
from expertd_engine.experts.transfer import Transfers
from expertd_engine.request import ExpertCounts

LEASES_AHEAD = 4
"""Leases asked for beyond the one computing. Few, because each takes a slot from the experts that could stay: on a
cycle over 480 experts with 120 slots, 4 gives 24 % hits, a whole layer of 16 gives 22 %."""


class ExpertUnavailableError(ExpertdError):
    """A routed expert could not be loaded, so this step cannot be computed."""


@dataclass(slots=True)
class _Lease:
    expert: ExpertId
    lease_id: int
    slot: int | None = None
    denied: str | None = None


class ExpertCache:
    """Leases experts to the running step, in the order asked, a few at a time.

    `record_bytes[layer]` is the length of a record of that MoE layer in bytes.
    """

    def __init__(
        self, ledger: Ledger, slab: Slab, transfers: Transfers, lookahead: Lookahead, record_bytes: Sequence[int]
    ) -> None:
        self.ledger = ledger
        self.transfers = transfers
        self.lookahead = lookahead
        self.stall_s = 0.0
        self.pulse: Callable[[], None] = _no_pulse
        """Called before each layer's leases: a step that loads many experts can take minutes, and says so by this."""
        self._slab = slab
        self._record_bytes = record_bytes
        self._experts_per_layer = max(ledger.experts_per_layer)
        self._period = len(record_bytes) * self._experts_per_layer
        self._step = 0
        self._next_lease = 0
        self._leases: dict[int, _Lease] = {}
        self._began = ExpertCounts()

    # ------------------------------------------------------------ steps

    def begin_step(self, token_ids: Sequence[int]) -> None:
        """A new step over these tokens begins: tell the ledger what is foreseen."""
        self._step += 1
        self._began = self._totals()
        self._predict(tuple(self.lookahead.begin_step(self._step, token_ids)))

    def end_step(self) -> ExpertCounts:
        """The step has ended (well or not): drop stale hints, return what it met."""
        self._handle(Tick((self._step + 1) * self._period))
        return self._totals() - self._began

    def lease_each(
        self, layer: int, experts: Sequence[int], *, scanned: Container[int] = ()
    ) -> Generator[tuple[int, int]]:
        """Yield `(expert, slot)` for each of `experts` (ascending), leased while the consumer works on it.

        `scanned`: those that prompt tokens alone ask for (law 5). Raises ExpertUnavailableError. Close the generator
        when done: every lease ends with it, whatever ends it.
        """
        self.pulse()
        foreseen = tuple(self.lookahead.routed(self._step, layer, experts))
        outstanding: list[_Lease] = []
        asked = 0
        try:
            for index, expert in enumerate(experts):
                while asked < min(len(experts), index + 1 + LEASES_AHEAD):
                    outstanding.append(self._demand(ExpertId(layer, experts[asked]), experts[asked] in scanned))
                    asked += 1
                if asked == len(experts) and foreseen:
                    self._predict(foreseen)
                    foreseen = ()
                yield expert, self._wait(outstanding[0])
                lease = outstanding.pop(0)
                del self._leases[lease.lease_id]
                self._handle(Release(lease.lease_id))
        finally:
            if outstanding:
                self._abort(outstanding)

    def set_budget(self, budget_bytes: int) -> None:
        """Change the expert budget. Raises BudgetError below the minimum; then nothing changes."""
        self._handle(SetBudget(budget_bytes))

    def pump(self) -> None:
        """Take in all completions at hand, without waiting."""
        while not self.transfers.completions.empty():
            self._handle(self.transfers.completions.get())

    def close(self) -> None:
        self.transfers.close()

    # ------------------------------------------------------------ leases

    def _demand(self, expert: ExpertId, scan: bool) -> _Lease:
        self._next_lease += 1
        lease = self._leases[self._next_lease] = _Lease(expert, self._next_lease)
        position = self._step * self._period + expert.layer * self._experts_per_layer + expert.expert
        self._handle(
            Demand(lease.lease_id, expert, position, next_use=self.lookahead.next_use(expert, position), scan=scan)
        )
        return lease

    def _wait(self, lease: _Lease) -> int:
        self.pump()
        began = time.perf_counter()
        while (slot := lease.slot) is None:
            if lease.denied is not None:
                layer, expert = lease.expert
                raise ExpertUnavailableError(f"expert {expert} of MoE layer {layer} cannot be loaded: {lease.denied}")
            self._handle(self.transfers.completions.get())
            self.stall_s += time.perf_counter() - began
            began = time.perf_counter()
        return slot

    def _abort(self, leases: Sequence[_Lease]) -> None:
        live = [lease for lease in leases if lease.denied is None]
        for lease in leases:
            del self._leases[lease.lease_id]
        self._handle(Abort(tuple(lease.lease_id for lease in live)))

    # ------------------------------------------------------------ instructions

    def _predict(self, hints: tuple[Hint, ...]) -> None:
        if hints:
            self._handle(Predict(hints))

    def _handle(self, event: Event) -> None:
        for instruction in self.ledger.handle(event):
            self._execute(instruction)

    def _execute(self, instruction: Instruction) -> None:
        match instruction:
            case Load(_, expert, slot, _):
                self.transfers.submit(instruction, self._slab.view(slot, self._record_bytes[expert.layer]))
            case Granted(lease_id, _, slot):
                self._leases[lease_id].slot = slot
            case Drop(slot, keep_bytes):
                self._slab.drop(slot, keep_bytes)
            case Promote(load_id):
                self.transfers.promote(load_id)
            case Cancel(load_id):
                self.transfers.cancel(load_id)
            case Denied(lease_id, _, reason):
                self._leases[lease_id].denied = reason

    def _totals(self) -> ExpertCounts:
        counters = self.ledger.counters
        return ExpertCounts(
            sum(counters.hits),
            sum(counters.late),
            sum(counters.misses),
            counters.demand_bytes + counters.prefetch_bytes,
            self.stall_s,
        )


def _no_pulse() -> None:
    return None
