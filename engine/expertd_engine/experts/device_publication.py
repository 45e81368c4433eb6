"""Two phases between an eviction and the next record in the slot: what each boundary between launches publishes. Pure.

Owner: the device cache. First the entry is pointed away from the slot, by words that the next launch applies before
anything else; then, for copies, the slot has *cooled*: whatever was launched before that boundary has been given to the
device, and the copies wait for it there. A step that lands a record in a handed slot needs no more than that its
launch applies the words: steps run one after another. Nor does a copy that is planned while no launch runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expertd_engine.experts.device_layout import Halves, TableLayout, Words, halves, signed
from expertd_engine.experts.events import ExpertId


@dataclass(frozen=True, slots=True)
class Boundary:
    """What a launch applies first, and the slots that only what was launched before it may read."""

    words: Words
    retired: tuple[int, ...]


class Publication:
    """Collects changes until the next boundary. `home(expert)` is the address of the host's copy, marked as such."""

    def __init__(self, layout: TableLayout, home: Callable[[ExpertId], int]) -> None:
        self._slots: list[Halves] = [(0, 0)] * layout.slots
        """Their addresses."""
        self._layout = layout
        self._home_of = home
        self._homes: dict[ExpertId, Halves] = {}
        self._words: Words = {}
        self._retired: dict[int, None] = {}
        self._copied: dict[int, ExpertId] = {}
        self._head = self._tail = 0

    @property
    def handed(self) -> int:
        """Slots that steps may still write into, as far as is known."""
        return self._tail - self._head

    @property
    def room(self) -> int:
        """Slots that may still be handed."""
        return self._layout.landing - self.handed

    def place_slot(self, slot: int, address: int) -> None:
        """A slot's memory is there."""
        self._slots[slot] = halves(address)
        self._words |= self._layout.slot_words(slot, address)

    def send_home(self, expert: ExpertId) -> None:
        """The expert is in no slot."""
        self._layout.note_address(self._words, expert, self._home(expert))

    def retire(self, slot: int, expert: ExpertId, lies_in: int) -> None:
        """The expert is not to be read in the slot: it lies in slot `lies_in`, or at home if that is negative."""
        address = self._slots[lies_in] if lies_in >= 0 else self._home(expert)
        self._layout.note_address(self._words, expert, address)
        self._retired[slot] = None

    def recall(self, slots: Sequence[int]) -> None:
        """All that was handed and not landed in: `slots`."""
        assert len(slots) == self.handed, "handed slots are not those that were not landed in"
        self._tail = self._head
        self._words[self._layout.tail] = signed(self._tail)
        self._retired |= dict.fromkeys(slots)

    def hand(self, slot: int) -> None:
        """A step may write into the slot, even into one that is being retired: it runs after those that read it."""
        assert self.room > 0, "the circular list is full"
        self._retired.pop(slot, None)
        self._words[self._layout.list + self._tail % self._layout.landing] = slot
        self._tail += 1
        self._words[self._layout.tail] = signed(self._tail)

    def landed(self, expert: ExpertId, slot: int, lies_in: int) -> None:
        """A step has written the expert's record into a handed slot. `lies_in`: where it is to be read; see `retire`.

        The step has published it itself; but words that were collected before may point elsewhere by now.
        """
        self._head += 1
        if lies_in == slot:
            self._layout.note_address(self._words, expert, self._slots[slot])

    def copied(self, expert: ExpertId, slot: int) -> None:
        """A copy of the expert's record into the slot is complete."""
        self._layout.note_copied(self._words, expert, slot, self._slots[slot])
        self._copied[slot] = expert

    def fetch(self, experts: Sequence[ExpertId], slots: Sequence[int]) -> None:
        """No launch runs, and all words that were taken are applied: `experts[i]` is copied into `slots[i]` from now
        on, and the next launch may meet it there. The slots are none of the `unready`."""
        self._layout.note_copying(self._words, experts, slots)
        for slot in slots:
            self._retired.pop(slot, None)

    @property
    def unready(self) -> dict[int, ExpertId]:
        """Slots whose `ready` the next boundary puts back, and whose record is complete in each: a copy that begins
        before that would lose its own."""
        return self._copied

    def moved(self, expert: ExpertId, slot: int) -> None:
        """The expert's record is in another slot by the time these words are applied."""
        self._layout.note_address(self._words, expert, self._slots[slot])
        self._retired.pop(slot, None)

    def hold(self, expert: ExpertId, is_held: bool) -> None:
        """Virtual mode may route to the expert from the next launch on, or may not any more."""
        self._words |= self._layout.held_words(expert, is_held)

    def boundary(self, *, awaited: bool = False) -> Boundary:
        """What was collected, for the next launch. `awaited`: what is copied next waits until the words are applied.

        Otherwise it waits for what was launched before alone, and might raise a slot's `ready` before the words put it
        back: a slot of which they do so is retired by the boundary after this one.
        """
        early = () if awaited else self._copied.keys() & self._retired.keys()
        taken = Boundary(self._words, tuple(slot for slot in self._retired if slot not in early))
        self._words, self._retired, self._copied = {}, dict.fromkeys(early), {}
        return taken

    def _home(self, expert: ExpertId) -> Halves:
        """Of the host's copy, which stays where it is."""
        if (home := self._homes.get(expert)) is None:
            home = self._homes[expert] = halves(self._home_of(expert))
        return home
