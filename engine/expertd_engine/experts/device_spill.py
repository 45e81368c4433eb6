"""Some experts' records in the host's memory, the others on disk: the tier below a device where the host is too small.

Owner: the engine thread. Which records stay is the host ledger's to decide, as on a machine without a device; a layer
leases what it lacks, and the records are copied into slots of the device before anything reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from expertd_engine.errors import BudgetError
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.device_layout import HOME
from expertd_engine.experts.device_streams import Device
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.ledger import Ledger
from expertd_engine.experts.lookahead import NoLookahead
from expertd_engine.experts.policy import Policy
from expertd_engine.experts.slab import Slab
from expertd_engine.experts.store_format import StoreIndex
from expertd_engine.experts.transfer import RecordReader, Transfers

logger = logging.getLogger(__name__)


class PinnedSlab(Slab):
    """A slab that is pinned as a whole. Pages that a device knows by address are never given back."""

    def drop(self, slot: int, keep_bytes: int = 0) -> None:
        return None


class SpilledHost:
    """Room for `budget_bytes` of a store's records; `threads` read the others from disk. Raises BudgetError when that
    is not two records.
    """

    complete = False

    def __init__(
        self, index: StoreIndex, device: Device, records: RecordReader, budget_bytes: int, policy: Policy, threads: int
    ) -> None:
        sizes = [index.record_bytes(layer) for layer in range(len(index.layers))]
        slots = budget_bytes // max(sizes)
        if slots < 2:
            raise BudgetError("host budget", budget_bytes, 2 * max(sizes), "one record copied, one read")
        self._device = device
        self._slab = PinnedSlab(slots, max(sizes))
        self.bytes = slots * self._slab.stride
        """Pinned, or at least in use, whatever lies in it."""
        counts = [layer.num_experts for layer in index.layers]
        ledger = Ledger(sizes, counts, slots * min(sizes), policy, prefetch=False)
        self.cache = ExpertCache(ledger, self._slab, Transfers(records, threads), NoLookahead(), sizes)
        reason = device.register(self._slab.address, self.bytes)
        self.fallback = None if reason is None else f"the system does not pin {self.bytes} bytes of memory: {reason}"
        """Why copies go through the driver's own buffer, slowly; None when they do not."""
        if self.fallback is not None:
            logger.warning("%s; copies go through the driver's own buffer, slowly", self.fallback)

    @property
    def address(self) -> int:
        """Of the first slot."""
        return self._slab.address

    @property
    def pinned(self) -> bool:
        return self.fallback is None

    def home(self, expert: ExpertId) -> int:
        """Nothing is read in place."""
        return HOME

    def begin_step(self) -> None:
        """A step begins."""
        self.cache.begin_step(())

    def end_step(self) -> None:
        """The step has ended, well or not."""
        self.cache.end_step()

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """`(place in experts, address of the record)`, all of them, some at a time as they come from disk: good until
        the next are asked for. Raises ExpertUnavailableError.
        """
        with self.cache.lease(layer, experts) as leases:
            given = 0
            while given < len(experts):
                some = leases.take()
                yield [(index, self._slab.address + slot * self._slab.stride) for index, slot in some]
                leases.release([index for index, _ in some])
                given += len(some)

    def close(self) -> None:
        """Stop reading and unpin. No copy may be under way."""
        self.cache.close()
        if self.pinned:
            self._device.unregister(self._slab.address)
