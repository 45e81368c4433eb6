"""Who waits and who runs, both by rank, and the KV blocks that come and go with them. The scheduler's own. Pure."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection

from expertd_engine.batching import Chooser
from expertd_engine.kv_pool import KVPool
from expertd_engine.messages import FinishReason
from expertd_engine.prefix_cache import PrefixCache
from expertd_engine.request import Sequence, SequenceState


class Queues:
    """Every live sequence is in one of the two; who runs holds blocks. `chooser` is told who stops running."""

    def __init__(self, pool: KVPool, prefixes: PrefixCache | None, chooser: Chooser) -> None:
        self.waiting: list[Sequence] = []
        """`WAITING` and `PREEMPTED`, by rank."""
        self.running: list[Sequence] = []
        """`RUNNING`, by rank."""
        self.num_preemptions = 0
        """Since start."""
        self._pool = pool
        self._prefixes = prefixes
        self._chooser = chooser

    def enqueue(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)

    def admit(self) -> bool:
        """Make the first waiting sequence a running one, if there are blocks for it beside those it finds computed."""
        sequence = self.waiting[0]
        found = self._prefixes.lookup(sequence) if self._prefixes is not None else []
        count = self._pool.blocks_for(sequence.num_tokens) - len(found)
        if not self._pool.can_allocate(count, besides=found):
            return False
        self._pool.share(found)
        sequence.admit(found + self._pool.allocate(count), len(found) * self._pool.block_tokens)
        if self._prefixes is not None:
            self._prefixes.count(sequence)
        insort(self.running, self.waiting.pop(0), key=_rank)
        return True

    def make_room(self, sequence: Sequence, num_tokens: int, preempted: list[Sequence]) -> bool:
        """Blocks for the next tokens of `sequence`, at the cost of those after it; False if it had to go itself."""
        if sequence.state is not SequenceState.RUNNING:
            return False
        count = self._pool.blocks_for(sequence.num_computed_tokens + num_tokens) - len(sequence.block_table)
        while not self._pool.can_allocate(count):
            victim = self.running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        sequence.block_table += self._pool.allocate(max(count, 0))
        return True

    def extend(self, reach: Collection[tuple[Sequence, int]]) -> bool:
        """Blocks for the tokens of each sequence up to and including a position, at nobody's cost; or none at all."""
        more = [(one, self._pool.blocks_for(position + 1) - len(one.block_table)) for one, position in reach]
        if not self._pool.can_allocate(sum(max(count, 0) for _, count in more)):
            return False
        for sequence, count in more:
            sequence.block_table += self._pool.allocate(max(count, 0))
        return True

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take a sequence out of its queue, for ever, and free what it held."""
        queue = self.running if sequence.state is SequenceState.RUNNING else self.waiting
        self._free(sequence.finish(reason))
        queue.remove(sequence)
        self._chooser.forget(sequence.sequence_id)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._chooser.forget(sequence.sequence_id)
        self.running.remove(sequence)
        self._free(sequence.preempt())
        self.enqueue(sequence)

    def _free(self, block_table: list[int]) -> None:
        """Last block first: a cached block is found only through those before it, so they go after it."""
        self._pool.free(reversed(block_table))


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
