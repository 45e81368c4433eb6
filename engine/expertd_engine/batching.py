"""Who of the running sequences computes in a step whose tokens do not suffice for all. Pure.

`expert-aware` is Read-ME's Algorithm 1, repaired: tokens that wait for the same experts stand in one queue, and a step
is filled from the queues that bring most tokens for each expert not yet in it, as long as there is room and a queue is
left. As printed, the algorithm does not end when all queues are empty, and tokens of a rare expert may wait for ever.
Here whoever was passed over `patience` steps in a row goes before all queues, the longest waiting first; each step
serves one of these at least, so nobody is passed over more than `patience` + (number of sequences - 1) times in a row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from expertd_engine.request import Sequence as Running

Batching = Literal["decode-first", "prefill-first", "expert-aware"]


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


def expert_aware(candidates: Sequence[Candidate], max_tokens: int, patience: int) -> list[Share]:
    """At most `max_tokens` tokens that use few experts together; see the head of the module for who cannot wait."""
    overdue = sorted(
        (i for i, one in enumerate(candidates) if one.waited >= patience),
        key=lambda i: (-candidates[i].waited, candidates[i].prefills, i),
    )
    shares = _overdue_shares(candidates, overdue, max_tokens)
    used = frozenset().union(*(candidates[share.place].experts for share in shares))
    left = max_tokens - sum(share.tokens for share in shares)
    queues = _queues(candidates, set(range(len(candidates))).difference(overdue))
    while left and queues:
        experts = max(queues, key=lambda key: _worth(candidates, queues[key], len(key - used), left))
        taken = _fill(candidates, queues.pop(experts), left)
        shares += taken
        used |= experts
        left -= sum(share.tokens for share in taken)
    return shares


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


def _queues(candidates: Sequence[Candidate], members: Iterable[int]) -> dict[frozenset[int], list[int]]:
    """Decodes by the experts they wait for, in their order; every prompt is a queue, with decodes of just its experts
    before it."""
    queues: dict[frozenset[int], list[int]] = {}
    for index in sorted(members, key=lambda i: (candidates[i].prefills, i)):
        queues.setdefault(candidates[index].experts, []).append(index)
    return queues


def _worth(candidates: Sequence[Candidate], queue: Sequence[int], new_experts: int, left: int) -> tuple[float, int]:
    """Tokens that fit for each expert that the step does not use yet; of equals the first in order."""
    tokens = min(left, sum(candidates[index].tokens for index in queue))
    return (tokens / new_experts if new_experts else float("inf")), -queue[0]


def _fill(candidates: Sequence[Candidate], order: Iterable[int], max_tokens: int) -> list[Share]:
    shares = []
    for index in order:
        if not max_tokens:
            break
        tokens = min(candidates[index].tokens, max_tokens)
        shares.append(Share(index, tokens))
        max_tokens -= tokens
    return shares


class Chooser:
    """Applies a batching to running sequences, and keeps account of who was passed over. Owned by the scheduler."""

    def __init__(self, batching: Batching, max_tokens: int, patience: int) -> None:
        """`max_tokens` in a step."""
        self.most_passed_over = 0
        """Steps in a row, of all sequences since start."""
        self._batching = batching
        self._max_tokens = max_tokens
        self._patience = patience
        self._passed_over: dict[int, int] = {}

    def shares(self, rows: Sequence[Running]) -> dict[int, int]:
        """Tokens by sequence id, for at least one of `rows`, all of which have tokens to compute."""
        candidates = [self._candidate(row) for row in rows]
        if self._batching == "prefill-first":
            shares = prefill_first(candidates, self._max_tokens)
        else:
            shares = expert_aware(candidates, self._max_tokens, self._patience)
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

    def _candidate(self, row: Running) -> Candidate:
        tokens, start = row.num_uncomputed_tokens, row.num_computed_tokens
        experts: frozenset[int] = frozenset()
        if row.paths is not None and self._batching == "expert-aware":
            union = row.paths.union(start, start + min(tokens, self._max_tokens))
            experts = frozenset(expert * len(union) + head for head, chosen in enumerate(union) for expert in chosen)
        return Candidate(tokens, tokens > 1, self._passed_over.get(row.sequence_id, 0), experts)
