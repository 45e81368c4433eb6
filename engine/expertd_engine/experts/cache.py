"""The thin shell around the residency ledger: carries out its instructions and waits for what a step needs.

Owner: the engine thread. The ledger decides, transfer threads move bytes, the slab holds them; this module only
connects the three and measures how long the step waited.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from queue import Empty

from expertd_engine.experts.accounting import Stalls, lease_window
from expertd_engine.experts.clairvoyant import ClairvoyantEstimate
from expertd_engine.experts.events import (
    Abort,
    Cancel,
    Demand,
    Denied,
    Drop,
    Event,
    Exchange,
    ExpertId,
    Granted,
    Hint,
    Instruction,
    Load,
    Predict,
    Promote,
    Remember,
    Served,
    SetBudget,
    Tick,
    Used,
)
from expertd_engine.experts.governor import Governor
from expertd_engine.experts.leases import Holder, LayerLeases, Lease
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.lookahead import LayerScan, Lookahead, NoLookahead
from expertd_engine.experts.pregated import PregatedLookahead
from expertd_engine.experts.slab import Slab
from expertd_engine.experts.transfer import Completion, Transfers
from expertd_engine.sequence_stats import ExpertCounts

PULSE_S = 1.0
"""While a step waits for a read, a sign of life goes out this often."""
PATIENCE_S = 120.0
"""A read that takes longer may never end: no more signs of life, and who watches the engine may call it wedged."""


class ExpertCache:
    """Leases experts to the running step, layer by layer.

    `record_bytes[layer]` is the length of a record of that MoE layer in bytes.
    """

    def __init__(
        self, ledger: Ledger, slab: Slab, transfers: Transfers, lookahead: Lookahead, record_bytes: Sequence[int]
    ) -> None:
        self.ledger = ledger
        self.transfers = transfers
        self.lookahead = lookahead
        self.stalls = Stalls()
        self.clairvoyant = ClairvoyantEstimate(ledger.experts_per_layer, self._slots_in_all)
        self.pulse: Callable[[], None] = _nobody
        """Called whenever a layer is given experts: a step that loads many can take minutes, and says so by this."""
        self.resized: Callable[[], None] = _nobody
        """Called when the budget has changed: who holds leases between steps must fit into it."""
        self.handled: Callable[[], None] = _nobody
        """Called after all that the ledger says: who holds leases between steps gives back what came too late, also
        while a step waits for that room."""
        self.payoff = governor.payoff if (governor := governor_in(lookahead)) is not None else None
        """Whether predictions are made now; None where nobody predicts."""
        self._unforeseen: Lookahead = lookahead.alone() if isinstance(lookahead, LayerScan) else NoLookahead()
        """In the lookahead's place while predictions do not pay: a step goes as if there were nobody to make any."""
        self._asked = lookahead
        """By the running step."""
        self._slab = slab
        self._record_bytes = record_bytes
        self._experts_per_layer = max(ledger.experts_per_layer)
        self._period = len(record_bytes) * self._experts_per_layer
        self._step = 0
        self._next_lease = 0
        self._leases: dict[int, Lease] = {}
        self._began = ExpertCounts()
        self._met: list[tuple[int, int, int]] = []
        """As `Served`, of the running step."""

    # ------------------------------------------------------------ steps

    def begin_step(self, token_ids: Sequence[int]) -> None:
        """A new step over these tokens begins: tell the ledger what is foreseen."""
        self._step += 1
        self._asked = self.lookahead if self.payoff is None or self.payoff.is_on else self._unforeseen
        self.clairvoyant.begin_step()
        self._began = self._totals()
        self.foresee(token_ids)

    def foresee(self, token_ids: Sequence[int]) -> None:
        """Tell the ledger what the running step over these tokens uses, as far as that is known now."""
        hints = tuple(self._asked.begin_step(self._step, token_ids))
        if hints:
            self.handle([Predict(hints)])

    def end_step(self) -> ExpertCounts:
        """The step has ended (well or not): drop stale hints, return what it met."""
        met, self._met = self._met, []
        self.handle([Served(tuple(met)), Tick((self._step + 1) * self._period)])
        self.stalls.end_step()
        return self._totals() - self._began

    def lease(
        self, layer: int, experts: Sequence[int], *, pairs: Sequence[int] = (), scanned: Container[int] = ()
    ) -> LayerLeases:
        """Leases on `experts` (ascending) of a layer, for a `with` block.

        `pairs`: how many (token, choice) pairs chose each; by default one. `scanned`: those that prompt tokens alone
        ask for (law 5).
        """
        hints = tuple(self._asked.routed(self._step, layer, experts))
        self.clairvoyant.use(layer, experts, self.ledger.resident_slots(layer))
        asked = [ExpertId(layer, expert) for expert in experts]
        return LayerLeases(self, asked, pairs or [1] * len(asked), scanned, self._after(layer, hints))

    def _after(self, layer: int, hints: tuple[Hint, ...]) -> Sequence[Event]:
        """What is foreseen once `layer` has routed. What was predicted of it alone and did not come is read no more."""
        told: list[Event] = [Predict(hints)] if hints else []
        if self._asked.exactness == "predicted":
            told.insert(0, Tick(self._step * self._period + (layer + 1) * self._experts_per_layer))
        return told

    @property
    def foresees(self) -> bool:
        """Whether each layer has to be told: its routes give hints, or loads are under way for those after it."""
        if isinstance(self._asked, PregatedLookahead):
            return self._asked.lacks
        return self._asked.exactness != "none"

    def used_in_passing(self, layers: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Decoding tokens chose these experts (with repeats) of these layers, all resident, and have been computed."""
        self.pulse()
        self.handle([self._used(layer, experts) for layer, experts in layers])

    def served(self, layers: Iterable[tuple[int, int, int]]) -> None:
        """Held experts have been computed: by layer how many, and the (token, choice) pairs that chose them. The ledger
        hears of it as the step ends."""
        self.pulse()
        self._met += layers

    def _used(self, layer: int, experts: Sequence[int]) -> Used:
        counts = Counter(experts)
        chosen = tuple(sorted(counts))
        self._asked.routed(self._step, layer, chosen)  # it foresees nothing, but may keep account
        self.clairvoyant.use(layer, chosen, self.ledger.resident_slots(layer))
        position = self._step * self._period + layer * self._experts_per_layer
        return Used(layer, chosen, tuple(counts[expert] for expert in chosen), position)

    def _slots_in_all(self) -> int:
        return self.ledger.budget_bytes // max(self._record_bytes)

    def set_budget(self, budget_bytes: int) -> None:
        """Change the expert budget. Raises BudgetError below the minimum; then nothing changes."""
        self.handle([SetBudget(budget_bytes)])
        self.resized()

    def pump(self) -> None:
        """Take in all completions at hand, without waiting."""
        done: list[Event] = []
        while not self.transfers.completions.empty():
            done.append(self.transfers.completions.get())
        if done:
            self.handle(done)

    def wait(self) -> None:
        """Wait for one completion: the step cannot go on without."""
        cause, began = self.ledger.stall_cause(), time.perf_counter()
        completion = None
        while completion is None:
            completion = self._next_completion(patient=time.perf_counter() - began < PATIENCE_S)
        self.stalls.add(cause, time.perf_counter() - began)
        self.handle([completion])

    def _next_completion(self, *, patient: bool) -> Completion | None:
        """The next, or None after a second in which there was none, and others have been told that this is no hang."""
        try:
            return self.transfers.completions.get(timeout=PULSE_S if patient else None)
        except Empty:
            self.pulse()
            return None

    def close(self) -> None:
        self.transfers.close()

    # ------------------------------------------------------------ what a layer's leases call

    @property
    def window(self) -> int:
        """Leases that a layer may hold at once."""
        return lease_window(self.ledger.budget_bytes, max(self._record_bytes))

    def demand(self, expert: ExpertId, *, scan: bool, pairs: int) -> Demand:
        """A demand under a new lease, not yet handled."""
        self._next_lease += 1
        position = self._step * self._period + expert.layer * self._experts_per_layer + expert.expert
        next_use = self._asked.next_use(expert, position)
        return Demand(self._next_lease, expert, position, next_use, scan, pairs)

    def exchange(self, released: Lease, expert: ExpertId, holder: Holder) -> Exchange:
        """`expert` under a new lease in the place of one that ends, not yet handled."""
        del self._leases[released.lease_id]
        self._next_lease += 1
        self._leases[self._next_lease] = Lease(self._next_lease, 0, expert, holder)
        return Exchange(released.lease_id, self._next_lease, expert)

    def remember(self, lease: Lease) -> None:
        self._leases[lease.lease_id] = lease

    def forget(self, lease_ids: Iterable[int]) -> None:
        for lease_id in lease_ids:
            del self._leases[lease_id]

    def abort(self, leases: Iterable[Lease]) -> None:
        """End leases in whatever state they are."""
        ended = tuple(lease.lease_id for lease in leases)
        self.forget(ended)
        self.handle([Abort(ended)])

    def recall(self, remember: Remember) -> None:
        """Take up what an earlier engine left: it is loaded where there is room, after all else."""
        self.handle([remember])

    def handle(self, events: Sequence[Event]) -> None:
        """Tell the ledger, and do as it says."""
        for instruction in self.ledger.handle_all(events):
            self._execute(instruction)
        self.handled()

    def _execute(self, instruction: Instruction) -> None:
        match instruction:
            case Granted(lease_id, _, slot):
                lease = self._leases[lease_id]
                lease.slot = slot
                lease.holder.granted.append(lease)
            case Load(_, expert, slot, _):
                self.transfers.submit(instruction, self._slab.view(slot, self._record_bytes[expert.layer]))
            case Drop(slot, keep_bytes):
                self._slab.drop(slot, keep_bytes)
            case Promote(load_id):
                self.transfers.promote(load_id)
            case Cancel(load_id):
                self.transfers.cancel(load_id)
            case Denied(lease_id, _, reason):
                lease = self._leases.pop(lease_id)
                lease.holder.denied(lease, reason)

    def _totals(self) -> ExpertCounts:
        counters = self.ledger.counters
        return ExpertCounts(
            sum(counters.hits),
            sum(counters.late),
            sum(counters.misses),
            counters.demand_bytes + counters.prefetch_bytes,
            self.stalls.total_s,
        )


def governor_in(lookahead: Lookahead) -> Governor | None:
    """Who governs a predicting lookahead."""
    inner = lookahead.inner if isinstance(lookahead, LayerScan) else lookahead
    return inner if isinstance(inner, Governor) else None


def _nobody() -> None:
    return None
