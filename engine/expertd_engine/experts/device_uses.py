"""Takes in many uses at once: what a policy by aged frequency makes of each, as arrays, in a tenth of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from expertd_engine.experts.policy import LFU, AdaptiveNextUse, Facts, Policy


def uses_of(policy: Policy) -> Callable[[Sequence[Facts]], None] | None:
    """What does to different experts at once as `policy.used` to one after another; None: there is nothing quicker."""
    return _Uses(policy) if isinstance(policy, LFU) else None


class _Uses:
    def __init__(self, policy: LFU) -> None:
        self._policy = policy

    def __call__(self, facts: Sequence[Facts]) -> None:
        policy = self._policy
        now = np.array([one.last_use for one in facts]) / policy.half_life
        weights = np.logaddexp2([one.weight for one in facts], now)  # as `with_use`
        for one, weight in zip(facts, weights.tolist(), strict=True):
            one.weight = weight
        if isinstance(policy, AdaptiveNextUse):
            policy.sample(facts)
