"""What goes into the residency ledger and what comes out: the contract between who decides and who acts.

Owner: the engine thread. `Ledger.handle(event)` takes one event and returns instructions, in the order in which they
must be carried out. Nothing here does I/O, reads a clock or knows torch.

Thousands of these are made for a token, which is why they are structs: five times as quick to make as dataclasses.

Positions are integers in virtual time: `step × (layers × experts) + layer × experts + expert`. They order uses, past
and future, without a clock.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, NamedTuple

import msgspec


class ExpertId(NamedTuple):
    """An expert's address: MoE layer ordinal (0-based, dense layers not counted) and index in that layer."""

    layer: int
    expert: int


class Priority(IntEnum):
    """Demand loads overtake prefetches (law 4)."""

    DEMAND = 0
    PREFETCH = 1


LookupResult = Literal["hit", "late", "miss"]

# ---------------------------------------------------------------- events


class Demand(msgspec.Struct, frozen=True, gc=False):
    """The current step needs `expert` and asks for a lease. Answered by `Granted`, now or after later events.

    Counts one lookup. `position` is this use; `next_use` the next known one after it (None: unknown). `scan` marks a
    use by prompt tokens alone, which must not flush the decode working set (law 5). `pairs` is how many (token, choice)
    pairs the use serves; 0 is no use: virtual mode wants the expert held, nothing is looked up and recency stays.
    """

    lease_id: int
    expert: ExpertId
    position: int
    next_use: int | None = None
    scan: bool = False
    pairs: int = 1


class Used(msgspec.Struct, frozen=True, gc=False):
    """A step has computed with these experts of a layer in passing: all were resident, nothing was asked for between.

    The same as `Demand` and `Release` for each, in order: `pairs[i]` pairs of decoding tokens chose `experts[i]`, whose
    use is at `position + experts[i]`.
    """

    layer: int
    experts: tuple[int, ...]
    pairs: tuple[int, ...]
    position: int


class Served(msgspec.Struct, frozen=True, gc=False):
    """A virtual step has computed with experts that are held: lookups that hit, and no more. What is held is leased, so
    it needs no recency; what is not should not age by it.

    By layer: its number, how many of its experts, and the (token, choice) pairs that they served.
    """

    layers: tuple[tuple[int, int, int], ...]


class Hint(msgspec.Struct, frozen=True, gc=False):
    expert: ExpertId
    needed_at: int
    """Position of the foreseen use."""
    trust: int = -1
    """How sure its source is, a rising number of the source's own; -1: it does not say."""


class Predict(msgspec.Struct, frozen=True, gc=False):
    """Foreseen uses, soonest first. May start prefetches; also tells next-use policies what they need to know."""

    hints: tuple[Hint, ...]


class Loaded(msgspec.Struct, frozen=True, gc=False):
    """The load's bytes are all in its slot."""

    load_id: int


class Failed(msgspec.Struct, frozen=True, gc=False):
    """The load ended without its bytes. A demanded record is tried once more, then its leases are `Denied`."""

    load_id: int
    reason: str


class Cancelled(msgspec.Struct, frozen=True, gc=False):
    """Answer to `Cancel` for a load that had not begun: nothing was and nothing will be written."""

    load_id: int


class Release(msgspec.Struct, frozen=True, gc=False):
    """The step has done with a granted lease. Releasing twice, or what was never granted, is an error (law 3)."""

    lease_id: int


class Abort(msgspec.Struct, frozen=True, gc=False):
    """The step was given up: end these leases in whatever state they are (waiting, loading, granted)."""

    lease_ids: tuple[int, ...]


class Exchange(msgspec.Struct, frozen=True, gc=False):
    """One granted lease ends and another, that is no use, is asked for in its place: `Release`, then `Demand` with no
    pairs. Where there is no other room, the newcomer gets the very slot of who leaves."""

    released: int
    lease_id: int
    expert: ExpertId


class PastUse(msgspec.Struct, frozen=True, gc=False):
    """What an earlier engine knew of one expert's uses, as of its end: `experts.policy.Facts`, lookups counted back."""

    expert: ExpertId
    last_use: int
    """Negative."""
    weight: float
    """What is left of it."""


class Remember(msgspec.Struct, frozen=True, gc=False):
    """What an earlier engine has left: the uses of experts, and who was resident, best first.

    Only for a ledger that has met no lookup. Those not resident are loaded where there is room, after all else.
    """

    uses: tuple[PastUse, ...]
    residents: tuple[ExpertId, ...]


class SetBudget(msgspec.Struct, frozen=True, gc=False):
    """A new expert budget in bytes; becomes the limit as soon as unleased bytes allow (law 1)."""

    budget_bytes: int


class Tick(msgspec.Struct, frozen=True, gc=False):
    """All uses before `position`, where a step or a layer ends, are past or asked for: hints of others were wrong, and
    prefetches for those are given up."""

    position: int


Event = (
    Demand
    | Used
    | Served
    | Predict
    | Loaded
    | Failed
    | Cancelled
    | Release
    | Abort
    | Exchange
    | SetBudget
    | Tick
    | Remember
)

# ---------------------------------------------------------------- instructions


class Load(msgspec.Struct, frozen=True, gc=False):
    """Read `expert`'s record into `slot`. The slot's earlier content is dead from now on."""

    load_id: int
    expert: ExpertId
    slot: int
    priority: Priority


class Promote(msgspec.Struct, frozen=True, gc=False):
    """A prefetch under way is now demanded: move it ahead of all prefetches."""

    load_id: int


class Cancel(msgspec.Struct, frozen=True, gc=False):
    """Give the load up if it has not begun (answer `Cancelled`); else let it end (`Loaded` or `Failed`) as doomed."""

    load_id: int


class Drop(msgspec.Struct, frozen=True, gc=False):
    """Return the slot's memory from byte `keep_bytes` on to the system. The bytes stop being charged at once."""

    slot: int
    keep_bytes: int = 0


class Granted(msgspec.Struct, frozen=True, gc=False):
    """The lease holds: the record stays in `slot`, unchanged, until `Release`."""

    lease_id: int
    expert: ExpertId
    slot: int


class Denied(msgspec.Struct, frozen=True, gc=False):
    """The lease cannot be had: the record could not be loaded. The lease has ended."""

    lease_id: int
    expert: ExpertId
    reason: str


Instruction = Load | Promote | Cancel | Drop | Granted | Denied
