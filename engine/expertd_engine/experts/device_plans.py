"""Around launches whose routes are all known when they begin: has their experts fetched by one plan, at once. Thin.

Owner: the engine thread. The device stands still until the launch, and the link with it: so the first copies begin
before anything else is done, into slots that are kept empty for that.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.device_digest import Digest
from expertd_engine.experts.device_events import Fetch
from expertd_engine.experts.device_executor import GIVEN_AT_ONCE, Executor

if TYPE_CHECKING:
    from expertd_engine.experts.device_steps import DeviceSteps

NOTHING: NDArray[np.int64] = np.empty(0, np.int64)
"""No experts, or none that are known."""
_SPARE_BYTES, _SPARE_SHARE = 48 * 2**20, 32
"""Slots are kept empty for so many bytes, but at most such a part of them: what is copied while it is planned who gives
way for the rest of a step."""

_FIRST = 2
"""Records whose copies begin before the others are even looked at, since each takes the host some time."""


def nothing_known() -> NDArray[np.int64]:
    """Of a step whose routes are not known when it begins."""
    return NOTHING


class Plans:
    """Of one cache."""

    def __init__(self, cache: DeviceSteps, executor: Executor, digest: Digest) -> None:
        self.launches_ahead = False
        """Whether a launch never waits for the host: then copies that it waits for may be given behind it."""
        self._cache, self._executor, self._digest = cache, executor, digest

    @property
    def fetches(self) -> bool:
        """Whether what a step is known to use can be copied before it is needed."""
        cache = self._cache
        return cache.ledger.fetches and not (cache.by_layer or cache.device.shares_memory)

    def fetch(self, known: NDArray[np.int64], untold: NDArray[np.int64]) -> None:
        """A step is about to be launched that uses the experts of these numbers (`Fetch`): bring in all that it lacks.
        `untold`: those of the launch before, if that knew them too; what it met is told while this one runs."""
        cache, executor = self._cache, self._executor
        cache.copies.end_fetches()  # which a launch may wait for
        cache.device.compute.mark().wait()  # whatever read slots, and all words, are past
        fetch, unready = partial(Fetch, known, untold), cache.publication.unready
        if len(untold):
            for most in (_FIRST, None):
                executor.handle([fetch(unready, evict=False, most=most)])
                cache.copies.give(GIVEN_AT_ONCE)
        else:
            self._digest.take_in()  # or what landed would count as absent
        executor.pump([])
        executor.handle([fetch(unready, evict=True, spare=self._spare)])
        if self.launches_ahead:
            cache.copies.give(GIVEN_AT_ONCE)
        else:
            cache.copies.give_all()

    @property
    def _spare(self) -> int:
        slots = -(-_SPARE_BYTES // max(self._cache.record_bytes))
        return min(slots, -(-self._cache.ledger.pool.limit // _SPARE_SHARE))
