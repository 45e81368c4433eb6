"""What goes into the ledger of a device's slots, and what comes out, beyond what `events` has for every ledger.

Owner: the engine thread. On a device nobody asks before an expert is used: a step runs as one launch, reads what is
absent from the host's copy, and may write it into a slot that it was handed. The ledger hears of that a step later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from expertd_engine.experts.events import Event, ExpertId, Instruction

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HIT, READ, WAITED, LANDED, COMPUTED, SHARED = 0, 1, 2, 3, 4, 5
"""Where a use found its record: in a slot; at home, over the link; in a slot whose copy it waited for; at home, and
wrote it into a slot on the way; at home, where the processor computed it; at home, where the processor computed a part
while the other was read over the link."""

# ---------------------------------------------------------------- events


class Seen(msgspec.Struct, frozen=True, gc=False):
    """What a step that has ended met in one layer: `pairs[i]` pairs chose `experts[i]`, found at `sources[i]`.

    The use of expert e is at `position + e`. `scan`: by prompt tokens alone (law 5). `shared_bytes` crossed the link of
    the one that the processor computed a part of.
    """

    layer: int
    experts: Sequence[int]
    sources: Sequence[int]
    pairs: Sequence[int]
    position: int
    scan: bool = False
    shared_bytes: int = 0


class Landed(msgspec.Struct, frozen=True, gc=False):
    """A step that has ended wrote the expert's record into a slot it had been handed, and steps now read it there.

    Not `whole`: the step failed, and what is in the slot may be anything.
    """

    expert: ExpertId
    slot: int
    scan: bool = False
    whole: bool = True


class Cooled(msgspec.Struct, frozen=True, gc=False):
    """Every step that could still read what lay in these retired slots comes before whatever is copied next."""

    slots: Sequence[int]


class Provide(msgspec.Struct, frozen=True, gc=False):
    """Have so many slots set aside ahead of need: `landing` handed to steps, `reserve` for copies.

    `still`: no step is running, so that what was handed can be taken back.
    """

    landing: int
    reserve: int
    still: bool = False


class Confine(msgspec.Struct, frozen=True, gc=False):
    """Use the first `slots` slots alone until the budget is set, which is next. No step runs, no copy is in flight.

    Nothing is copied before what this retires and recalls has cooled.
    """

    slots: int


class Lend(msgspec.Struct, frozen=True, gc=False):
    """Give up to so many of the slots that are set aside for copies to a prefill, until they are taken back."""

    most: int


class Adopt(msgspec.Struct, frozen=True, gc=False):
    """The record was streamed into a lent slot, and may stay there if the expert is absent."""

    expert: ExpertId
    slot: int


class Fill(msgspec.Struct, frozen=True, gc=False):
    """Bring these in, in order, for as long as there are slots that nothing lies in. Evicts nothing."""

    experts: Sequence[ExpertId]


class Keep(msgspec.Struct, frozen=True, gc=False):
    """Bring the expert in, and let nothing evict it until `LetGo`; answered by `Kept`, now or later."""

    expert: ExpertId


class LetGo(msgspec.Struct, frozen=True, gc=False):
    """The expert, kept or to be kept, may be evicted again."""

    expert: ExpertId


class Fetch(msgspec.Struct, frozen=True, gc=False):
    """The step that begins uses the experts of these numbers, all launches have ended, and the last boundary is
    applied: bring in who is absent, in that order, as far as there are slots. Expert e of layer l is number
    `first[l] + e`.

    `evict`: others give way for them, and until `spare` slots more are empty, last those that the step before used, if
    that is `untold`; and what landed has been told. Else only into slots that are empty already, and no more than
    `most`. `unready`: slots that may not be written before the next boundary, and who is in each.
    """

    numbers: NDArray[np.int64]
    untold: NDArray[np.int64]
    unready: Mapping[int, ExpertId]
    evict: bool
    spare: int = 0
    most: int | None = None


class Fetched(msgspec.Struct, frozen=True, gc=False):
    """All copies of that number are complete."""

    number: int


class Met(msgspec.Struct, frozen=True, gc=False):
    """What a step that has ended met in all its layers, by decoding tokens: as `Seen` of each layer, in one.

    All int64 `[n]`, layer by layer; `numbers` as of `Fetch`. `sources` are HIT, READ and WAITED alone. Layer l's
    experts are used from `position + l * stride` on.
    """

    layers: NDArray[np.int64]
    numbers: NDArray[np.int64]
    sources: NDArray[np.int64]
    pairs: NDArray[np.int64]
    position: int
    stride: int


# ---------------------------------------------------------------- instructions


class Retire(msgspec.Struct, frozen=True, gc=False):
    """From the next launch on, steps must not read `expert` in `slot`; then answer `Cooled`, unless it is handed."""

    slot: int
    expert: ExpertId


class Hand(msgspec.Struct, frozen=True, gc=False):
    """From the next launch on, steps may write an absent expert into this slot."""

    slot: int


class Recall(msgspec.Struct, frozen=True, gc=False):
    """From the next launch on, these slots are no step's to write into any more; then answer `Cooled`."""

    slots: Sequence[int]


class Kept(msgspec.Struct, frozen=True, gc=False):
    """The expert is in a slot, and stays there."""

    expert: ExpertId


class Lent(msgspec.Struct, frozen=True, gc=False):
    """The slots lent."""

    slots: Sequence[int]


class Move(msgspec.Struct, frozen=True, gc=False):
    """Copy the expert's record from a slot that is given up to another, and have steps read it there."""

    expert: ExpertId
    origin: int
    slot: int


class PassOn(msgspec.Struct, frozen=True, gc=False):
    """From the next launch on, steps must not read these experts in slots: others are fetched into these."""

    experts: Sequence[ExpertId]


class Fetching(msgspec.Struct, frozen=True, gc=False):
    """Copy `experts[i]` into `slots[i]`, in that order, at once; from the next launch on steps wait for it there. Then
    answer `Fetched`."""

    number: int
    experts: Sequence[ExpertId]
    slots: Sequence[int]


DeviceEvent = (
    Event | Seen | Met | Landed | Cooled | Provide | Confine | Lend | Adopt | Fill | Keep | LetGo | Fetch | Fetched
)
"""All that a device's ledger takes."""
DeviceInstruction = Instruction | Retire | Hand | Recall | Lent | Move | Kept | PassOn | Fetching
"""All that it gives."""
