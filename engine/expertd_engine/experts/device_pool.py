"""The slots of a device: what each is there for. Pure; owned by the device's ledger.

Slots are equally long and lie in memory that was allotted before. A slot that lost its record is *cooling* until no
step that was launched can read it; only then may a copy write into it. A slot *handed* to steps is written by them, in
the order in which steps run: it may be handed while it cools.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from expertd_engine.experts.accounting import LedgerError, Slots, Story
from expertd_engine.experts.events import Instruction


class Use(IntEnum):
    """What a slot is there for."""

    GONE = 0
    """Nothing: it is beyond the budget."""
    FREE = 1
    """Nothing yet."""
    COLD = 2
    """A copy may be made into it."""
    COOLING = 3
    """It may still be read by a step that was launched."""
    LENT = 4
    """A prefill streams experts through it."""
    HANDED = 5
    """Steps may write into it."""
    OWNED = 6
    """It holds a record, or a copy of one is on its way into it."""


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Slots lie in chunks of memory, each allotted and freed as one, whose length is a multiple of `granule` bytes."""

    slot_bytes: int
    chunk_slots: int
    granule: int

    def bytes_of(self, slots: int) -> int:
        """Memory that a chunk of so many slots takes."""
        return -(-slots * self.slot_bytes // self.granule) * self.granule

    def budget_of(self, slots: int) -> int:
        """The smallest budget with so many slots."""
        whole, rest = divmod(slots, self.chunk_slots)
        return whole * self.bytes_of(self.chunk_slots) + self.bytes_of(rest)

    def slots_within(self, budget_bytes: int) -> int:
        """The most slots whose chunks, all whole but the last, take at most `budget_bytes`."""
        whole, rest = divmod(budget_bytes, self.bytes_of(self.chunk_slots))
        return whole * self.chunk_slots + rest // self.granule * self.granule // self.slot_bytes


class SlotPool(Slots):
    """`count` slots of `slot_bytes` each, of which the first `limit` may be used.

    Charged are all slots but the gone and the free ones, whole.
    """

    def __init__(self, count: int, slot_bytes: int, limit: int) -> None:
        super().__init__(0)
        self.slot_bytes = slot_bytes
        self._occupied = 0
        self.count = count
        self.limit = 0
        self._places: list[dict[int, None]] = [{} for _ in Use]
        self._use = [Use.GONE] * count
        self._owned_bytes: dict[int, int] = {}
        self._places[Use.GONE] = dict.fromkeys(range(count))
        self.set_limit(limit)

    # ------------------------------------------------------------ queries

    def number(self, *uses: Use) -> int:
        """How many slots are in one of these uses."""
        return sum(len(self._places[use]) for use in uses)

    def use(self, slot: int) -> Use:
        return self._use[slot]

    def slots(self, use: Use) -> list[int]:
        """In the order in which they came to that use."""
        return list(self._places[use])

    @property
    def occupied(self) -> int:
        """Bytes of the records that own slots."""
        return self._occupied

    # ------------------------------------------------------------ what `Residency` calls

    def take(self, nbytes: int, limit: int, out: list[Instruction]) -> int:
        """A slot for a copy: a cold one, or one that was never used. There must be one."""
        slot = self.first(Use.COLD, Use.FREE)
        if slot is None:
            raise LedgerError("law 1: a copy without a slot that may be written")
        self.own(slot, nbytes)
        return slot

    def vacate(self, slot: int) -> None:
        """The record in the slot is given up; steps that were launched may still read it."""
        self._occupied -= self._owned_bytes.pop(slot)
        self.put(slot, Use.COOLING)

    def check(self, owned: dict[int, int], story: Story) -> None:
        """`owned` maps slots to the bytes of the record in each. Raises LedgerError where they differ from ours."""
        if owned != self._owned_bytes or sorted(owned) != sorted(self._places[Use.OWNED]):
            raise story.error(f"slots hold {self._owned_bytes}, but records own {owned}")
        if self._occupied != sum(owned.values()) or any(slot >= self.limit for slot in self._used()):
            raise story.error(f"law 1: slots {sorted(self._used())} of {self.limit} in use, {self._occupied} bytes")

    # ------------------------------------------------------------ what the ledger calls

    def first(self, *uses: Use) -> int | None:
        """The slot that has been longest in the first of these uses that has one."""
        for use in uses:
            if self._places[use]:
                return next(iter(self._places[use]))
        return None

    def put(self, slot: int, use: Use) -> None:
        """The slot is there for `use` from now on."""
        before = self._use[slot]
        del self._places[before][slot]
        self._use[slot] = use
        self._places[use][slot] = None
        if (was_free := before <= Use.FREE) is not (use <= Use.FREE):
            self.charged += self.slot_bytes if was_free else -self.slot_bytes
            self.peak = max(self.peak, self.charged)

    def own(self, slot: int, nbytes: int) -> None:
        """A record of `nbytes` is in the slot, or will be."""
        self.put(slot, Use.OWNED)
        self._owned_bytes[slot] = nbytes
        self._occupied += nbytes

    def pass_on(self, slot: int, nbytes: int) -> None:
        """The slot's record is given up, and another of `nbytes` will be in it."""
        self._occupied += nbytes - self._owned_bytes[slot]
        self._owned_bytes[slot] = nbytes

    def set_limit(self, limit: int) -> None:
        """Slots from `limit` on are gone once nothing owns them; those below it are there."""
        self.limit = limit
        for slot in range(self.count):
            if slot >= limit and self._use[slot] is not Use.OWNED:
                self.put(slot, Use.GONE)
            elif slot < limit and self._use[slot] is Use.GONE:
                self.put(slot, Use.FREE)

    def _used(self) -> Iterable[int]:
        return (slot for slot, use in enumerate(self._use) if use > Use.FREE)
