"""What a layer holds while it computes: leases on its experts, asked for a few at a time. They end with the layer.

Owner: the engine thread. The expert cache says what the ledger answers.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from expertd_engine.errors import ExpertdError
from expertd_engine.experts.events import Event, ExpertId, Release

if TYPE_CHECKING:
    from expertd_engine.experts.cache import ExpertCache


class ExpertUnavailableError(ExpertdError):
    """A routed expert could not be loaded, so this step cannot be computed."""


@dataclass(slots=True)
class Lease:
    """One expert in a slot, from when it is granted to when it is released or aborted."""

    lease_id: int
    index: int
    """Place among the experts that the layer asked for."""
    expert: ExpertId
    holder: Holder
    slot: int = -1


class Holder(Protocol):
    """Who asks for leases, and is told what becomes of them."""

    granted: list[Lease]

    def denied(self, lease: Lease, reason: str) -> None:
        """The ledger has ended the lease."""
        ...


class LayerLeases:
    """One layer's leases: asked for in ascending order, a window at a time, given as they are granted.

    A context manager: every lease ends with the block, whatever ends it.
    """

    def __init__(
        self,
        cache: ExpertCache,
        experts: Sequence[ExpertId],
        pairs: Sequence[int],
        scanned: Container[int],
        after: Sequence[Event],
    ) -> None:
        """`after`: what the ledger is told once all experts are asked for."""
        self._cache = cache
        self._experts = experts
        self._pairs = pairs
        self._scanned = scanned
        self._after = after
        self._open: dict[int, Lease] = {}
        """By index."""
        self._asked = 0
        self.granted: list[Lease] = []
        """Not yet taken."""
        self.failure: ExpertUnavailableError | None = None

    def __enter__(self) -> LayerLeases:
        self._cache.handle(self._demands())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._cache.abort(self._open.values())

    def take(self) -> list[tuple[int, int]]:
        """`(index, slot)` of all that was granted since the last call, ascending by index, waiting for at least one.

        A slot holds the record of `experts[index]` until `release`. Raises ExpertUnavailableError.
        """
        self._cache.pump()
        while not self.granted and self.failure is None:
            self._cache.wait()
        if self.failure is not None:
            raise self.failure
        self._cache.pulse()
        taken = sorted((lease.index, lease.slot) for lease in self.granted)
        self.granted.clear()
        return taken

    def release(self, indices: Iterable[int]) -> None:
        """The step has done with these taken ones; the next of the layer's experts are asked for."""
        ended = [self._open.pop(index).lease_id for index in indices]
        self._cache.forget(ended)
        self._cache.handle([*map(Release, ended), *self._demands()])

    def denied(self, lease: Lease, reason: str) -> None:
        """The ledger has ended the lease."""
        del self._open[lease.index]
        layer, expert = lease.expert
        self.failure = ExpertUnavailableError(f"expert {expert} of MoE layer {layer} cannot be loaded: {reason}")

    def _demands(self) -> list[Event]:
        stop = min(len(self._experts), self._asked + self._cache.window - len(self._open))
        events: list[Event] = []
        for index in range(self._asked, stop):
            expert = self._experts[index]
            demand = self._cache.demand(expert, scan=expert.expert in self._scanned, pairs=self._pairs[index])
            lease = self._open[index] = Lease(demand.lease_id, index, expert, self)
            self._cache.remember(lease)
            events.append(demand)
            self._asked += 1
        if self._asked == len(self._experts) and self._after:
            events += self._after
            self._after = ()
        return events
