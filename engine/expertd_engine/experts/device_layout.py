"""Where everything lies in the words of a device's expert table. Pure.

The table is one array of 32-bit words, so that one scatter applies all that a boundary between steps changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertd_engine.experts.events import ExpertId

HOME = 1
"""Bit of an entry's address: the record is read at home, over the link. Records begin at multiples of 4096."""

Words = dict[int, int]
"""Word index → signed 32-bit value."""
Halves = tuple[int, int]
"""The lower and the upper word of an address."""


@dataclass(frozen=True, slots=True)
class TableLayout:
    """A table of `layers` × `experts` entries, `slots` slots, and a circular list of `landing` places, a power of two.

    entries int64 [layers, experts, 2] · slot_address int64 [slots] · ready [slots] · landing [landing] · head · tail ·
    held [layers, experts] · launch · one word that nobody reads
    """

    layers: int
    experts: int
    slots: int
    landing: int

    def __post_init__(self) -> None:
        if self.landing < 1 or self.landing & (self.landing - 1):
            raise ValueError(f"a circular list of {self.landing} places is not allowed: give a power of two")

    @property
    def slot_address(self) -> int:
        return 4 * self.layers * self.experts

    @property
    def ready(self) -> int:
        return self.slot_address + 2 * self.slots

    @property
    def list(self) -> int:
        return self.ready + self.slots

    @property
    def head(self) -> int:
        return self.list + self.landing

    @property
    def tail(self) -> int:
        return self.head + 1

    @property
    def held(self) -> int:
        return self.tail + 1

    @property
    def launch(self) -> int:
        return self.held + self.layers * self.experts

    @property
    def unread(self) -> int:
        return self.launch + 1

    @property
    def words(self) -> int:
        """Length of the table, a multiple of two."""
        return (self.unread + 2) // 2 * 2

    def note_address(self, words: Words, expert: ExpertId, address: Halves) -> None:
        """Into `words`: to have the record read at `address`."""
        layer, index = expert
        first = 4 * (layer * self.experts + index)
        words[first], words[first + 1] = address

    def note_copied(self, words: Words, expert: ExpertId, slot: int, address: Halves) -> None:
        """Into `words`: to have the record, which was copied into the slot, read there for good. The slot's `ready` is
        put back: the next copy into it begins after a boundary later than this one."""
        self.note_address(words, expert, address)
        layer, index = expert
        flag = 4 * (layer * self.experts + index) + 2
        words[flag] = words[flag + 1] = words[self.ready + slot] = 0

    def note_copying(self, words: Words, experts: Sequence[ExpertId], slots: Sequence[int]) -> None:
        """Into `words`: to have each record awaited in its slot, into which it is being copied. The upper half of the
        word is never anything but 0."""
        for (layer, index), slot in zip(experts, slots, strict=True):
            words[4 * (layer * self.experts + index) + 2] = slot + 1

    def held_words(self, expert: ExpertId, is_held: bool) -> Words:
        """Whether virtual mode may route to the expert."""
        return {self.held + expert.layer * self.experts + expert.expert: int(is_held)}

    def slot_words(self, slot: int, address: int) -> Words:
        """Where a slot lies."""
        first = self.slot_address + 2 * slot
        return dict(zip((first, first + 1), halves(address), strict=True))


def halves(address: int) -> Halves:
    """An address as words have it."""
    return signed(address), signed(address >> 32)


def signed(value: int) -> int:
    """The low 32 bits of `value` as a signed word."""
    return (value + 2**31) % 2**32 - 2**31
