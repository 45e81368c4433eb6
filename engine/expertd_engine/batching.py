"""Who of the running sequences computes in a step whose tokens do not suffice for all. Pure.

`expert-aware` is Read-ME's Algorithm 1, repaired: tokens that wait for the same experts stand in one queue, and a step
is filled from the queues that bring most tokens for each expert not yet in it. As printed, the algorithm does not end
when all queues are empty; here it ends with them, with the step's tokens, or with the experts that the cache has room
for. As printed, tokens of a rare expert may wait for ever; here whoever was passed over `patience` steps in a row goes
before all queues, the longest waiting first. Each step serves one of these at least, so nobody is passed over more than
`patience` + (number of sequences - 1) times in a row. Three things were added, for a cache that does not hold all:
prompts come before decodes, since a prompt held back for each of its pieces makes a long wait for a first token; the
experts of the step before before others, so that a group of sequences goes on until others are overdue; and a step
takes no more experts than there is room for, though it has tokens left, unless what there is no room for is read while
the step computes: then nobody is held back (`PacedRoom`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from expertd_engine.request import Sequence as Running
from expertd_engine.step_plan import SchedulerLimits

Batching = Literal["decode-first", "prefill-first", "expert-aware"]

_KEPT = 0.9
"""Of what earlier steps said about the paces of computing and reading, by every later one."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that could compute `tokens` now: one where it decodes, more or less of its prompt where not.

    `experts` are those of its next tokens, any numbering; `waited` counts steps in a row in which it was passed over.
    """

    tokens: int
    prefills: bool
    waited: int = 0
    experts: frozenset[int] = frozenset()


class Share(NamedTuple):
    """What the candidate at `place` among all gets of the step."""

    place: int
    tokens: int


def prefill_first(candidates: Sequence[Candidate], max_tokens: int) -> list[Share]:
    """Prompts in their order, as much of each as fits; then decodes in theirs."""
    order = sorted(range(len(candidates)), key=lambda i: not candidates[i].prefills)
    return _fill(candidates, order, max_tokens)


def expert_aware(
    candidates: Sequence[Candidate], max_tokens: int, patience: int, room: int, last: frozenset[int] = frozenset()
) -> list[Share]:
    """At most `max_tokens` tokens that use at most `room` experts together, if the first of them alone do not use more.

    `last` are the experts of the step before, which are likely to be at hand. See the head of the module for who goes
    first and who cannot wait.
    """
    overdue = _overdue(candidates, patience, room)
    shares = _overdue_shares(candidates, overdue, max_tokens)
    used = _union(candidates, [share.place for share in shares])
    left = max_tokens - sum(share.tokens for share in shares)
    others = set(range(len(candidates))).difference(overdue)
    for prefills in (True, False):
        queues = _queues(candidates, [i for i in others if candidates[i].prefills == prefills])
        while left and queues:
            experts = max(queues, key=lambda key: _worth(candidates, queues[key], key - used, last, left))
            queue = queues.pop(experts)
            if used and len(used | experts) > room:
                continue
            taken = _fill(candidates, queue, left)
            shares += taken
            used |= experts
            left -= sum(share.tokens for share in taken)
    return shares


def _overdue(candidates: Sequence[Candidate], patience: int, room: int) -> list[int]:
    """Those passed over `patience` times and more, the longest first, as far as there is room for their experts."""
    late = [i for i, one in enumerate(candidates) if one.waited >= patience]
    chosen: list[int] = []
    for index in sorted(late, key=lambda i: (-candidates[i].waited, candidates[i].prefills, i)):
        if not chosen or len(_union(candidates, [*chosen, index])) <= room:
            chosen.append(index)
    return chosen


def _overdue_shares(candidates: Sequence[Candidate], order: Sequence[int], max_tokens: int) -> list[Share]:
    """In their order; a prompt leaves a token for every overdue decode behind it, as far as there are any."""
    shares: list[Share] = []
    left, decodes = max_tokens, sum(not candidates[i].prefills for i in order)
    for index in order[:max_tokens]:
        one = candidates[index]
        decodes -= not one.prefills
        tokens = min(one.tokens, max(1, left - decodes), left)
        if not tokens:
            break
        shares.append(Share(index, tokens))
        left -= tokens
    return shares


def _union(candidates: Sequence[Candidate], places: Iterable[int]) -> frozenset[int]:
    return frozenset().union(*(candidates[place].experts for place in places))


def _queues(candidates: Sequence[Candidate], members: Iterable[int]) -> dict[frozenset[int], list[int]]:
    """By the experts that they wait for, in their order."""
    queues: dict[frozenset[int], list[int]] = {}
    for index in sorted(members):
        queues.setdefault(candidates[index].experts, []).append(index)
    return queues


def _worth(
    candidates: Sequence[Candidate], queue: Sequence[int], new: frozenset[int], last: frozenset[int], left: int
) -> tuple[bool, bool, float, int]:
    """First whoever needs no further expert, then none but those of the step before, then most tokens an expert."""
    tokens = min(left, sum(candidates[index].tokens for index in queue))
    return not new, new <= last, tokens / max(1, len(new)), -queue[0]


def _fill(candidates: Sequence[Candidate], order: Iterable[int], max_tokens: int) -> list[Share]:
    shares = []
    for index in order:
        if not max_tokens:
            break
        tokens = min(candidates[index].tokens, max_tokens)
        shares.append(Share(index, tokens))
        max_tokens -= tokens
    return shares


Room = Callable[[int], int]
"""How many experts a step may use, of so many that all who wait would use together."""


def unbounded(wanted: int) -> int:
    """Room where nothing is ever evicted."""
    return wanted


class PacedRoom:
    """Room for the experts that find a slot; for all where the others are read while a step computes anyway, since to
    hold anybody back for the sake of reads that nobody waits for only loses time.

    Learns both paces from the steps that it is told of, and grants slots alone until it knows them.
    """

    def __init__(self, slots: Callable[[], int], expert_bytes: int) -> None:
        """`slots` is how many experts find a slot, `expert_bytes` what one of them takes in all its layers."""
        self._slots = slots
        self._expert_bytes = expert_bytes
        self._compute_s = 0.0
        self._read_bytes = 0.0
        self._read_s = 0.0
        self._total = (0, 0.0)

    def __call__(self, wanted: int) -> int:
        slots = self._slots()
        unhidden_s = max(0, wanted - slots) * self._expert_bytes * self._read_s
        return wanted if unhidden_s < self._compute_s * self._read_bytes else slots

    def stepped(self, duration_s: float, total_bytes: int, total_s: float) -> None:
        """A step took `duration_s`. Since start so many bytes have been read, which took all readers together
        `total_s`."""
        read_bytes, read_s = total_bytes - self._total[0], total_s - self._total[1]
        self._total = (total_bytes, total_s)
        if read_bytes:
            self._read_bytes = self._read_bytes * _KEPT + read_bytes
            self._read_s = self._read_s * _KEPT + read_s
        else:
            self._compute_s += (duration_s - self._compute_s) * (1 - _KEPT if self._compute_s else 1.0)


class Chooser:
    """Applies a batching to running sequences, and keeps account of who was passed over. Owned by the scheduler."""

    def __init__(self, batching: Batching, room: Room = unbounded) -> None:
        """`room` counts experts as candidates number them."""
        self.most_passed_over = 0
        """Steps in a row, of all sequences since start."""
        self._batching = batching
        self._room = room
        self._last: frozenset[int] = frozenset()
        self._passed_over: dict[int, int] = {}

    @property
    def passes_over(self) -> bool:
        """Whether it chooses at all: with `decode-first` everybody who runs computes."""
        return self._batching != "decode-first"

    def shares(self, rows: Sequence[Running], limits: SchedulerLimits) -> dict[int, int]:
        """Tokens by sequence id, for at least one of `rows`, all of which have tokens to compute; within `limits`,
        which may be others in every step."""
        candidates = [self._candidate(row, limits.max_step_tokens) for row in rows]
        if self._batching == "prefill-first":
            shares = prefill_first(candidates, limits.max_step_tokens)
        else:
            room = self._room(len(_union(candidates, range(len(candidates)))))
            shares = expert_aware(candidates, limits.max_step_tokens, limits.patience_steps, room, self._last)
            self._last = _union(candidates, [share.place for share in shares])
        return {rows[share.place].sequence_id: share.tokens for share in shares}

    def stepped(self, rows: Iterable[Running], chosen: Collection[int]) -> None:
        """Of `rows`, those with the ids `chosen` are in the step, the others are passed over once more."""
        for row in rows:
            if row.sequence_id in chosen:
                self.forget(row.sequence_id)
            else:
                count = self._passed_over[row.sequence_id] = self._passed_over.get(row.sequence_id, 0) + 1
                self.most_passed_over = max(self.most_passed_over, count)

    def forget(self, sequence_id: int) -> None:
        """It has been chosen, or runs no more."""
        self._passed_over.pop(sequence_id, None)

    def _candidate(self, row: Running, max_tokens: int) -> Candidate:
        tokens, start = row.num_uncomputed_tokens, row.num_computed_tokens
        experts: frozenset[int] = frozenset()
        if row.paths is not None and self._batching == "expert-aware":
            union = row.paths.union(start, start + min(tokens, max_tokens))
            experts = frozenset(expert * len(union) + head for head, chosen in enumerate(union) for expert in chosen)
        return Candidate(tokens, tokens > 1, self._passed_over.get(row.sequence_id, 0), experts)
