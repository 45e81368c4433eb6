"""What was measured of a box and of a model on it, as plain data beside the store. Who measures is `profiling`; pure.

Seconds and bytes throughout. A profile belongs to one store, one box and the limits it was measured with.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import msgspec

from expertd_engine.errors import StoreError

PROFILE_VERSION = 2
PROFILE_NAME = "profile.json"


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class BoxProfile(_Part, frozen=True):
    """The machine, and the engine on it without any expert missing."""

    threads: int
    io_threads: int
    kernels: str
    reads_s: list[float]
    """Seconds until the last of n records asked for at once is there: entry n - 1, by the engine's own threads."""
    step_s: float
    """Seconds of one sequence's decode step whose experts are all there."""
    leave_s: float
    """What a layer costs beyond that for missing anything at all: it waits to be asked for, and computes by itself."""
    overlap: float
    """What missing records cost of the time they take to read alone: below 1, where others compute meanwhile."""
    virtual_s: float | None = None
    """Seconds of one sequence's decode step in virtual mode, sets moving; None without it."""


class MemoryProfile(_Part, frozen=True):
    """Bytes, as `startup_plan.Measured` has them, with the limits they were measured with."""

    base: int
    """Of a daemon that has served as much as its limits allow, at its peak, without `step`, experts and KV."""
    step: int
    kv_block: int
    block_tokens: int
    available: int
    max_step_tokens: int
    max_sequences: int
    max_model_len: int


class MissCurve(_Part, frozen=True):
    """What one sequence's decode misses at each share of all experts resident, by replay through the real ledger."""

    routing: str
    shares: list[float]
    """Ascending, of all expert bytes."""
    hit_rates: list[float]
    missing: list[list[float]]
    """For each share: how many layers of a token miss n + 1 experts, on average, at entry n."""


class LayerCurve(_Part, frozen=True):
    """Virtual mode in one MoE layer: how much gate mass is substituted at so many slots, and what that costs."""

    slots: list[int]
    """Ascending, from top-k to all."""
    mass: list[float]
    """Substituted mass of a token at these, 0 to 1."""
    sensitivity: float
    """KL divergence from exact mode, nats a token, for each unit of mass that this layer alone substitutes."""

    def loss(self, count: int) -> float:
        """Expected divergence at `count` slots, between measured ones on a straight line."""
        return self.sensitivity * _between(self.slots, self.mass, count)


class PathCurve(_Part, frozen=True):
    """Virtual mode where one index holds in all layers: what it costs to hold so many whole paths."""

    paths: list[int]
    """Ascending, from one to all."""
    mass: list[float]
    """Substituted mass of a token with these, 0 to 1."""
    divergence: list[float]
    """KL from exact mode with these, nats a token."""

    def loss(self, count: int) -> float:
        """Expected divergence with `count` paths, between measured ones on a straight line."""
        return _between(self.paths, self.divergence, count)


class ModelProfile(_Part, frozen=True):
    tokens: int
    """Of calibration text, each computed by itself through the real runtime."""
    misses: list[MissCurve]
    layers: list[LayerCurve]
    """Empty where the model has no virtual mode, or one of whole paths."""
    paths: PathCurve | None = None
    """Where virtual mode is of whole paths."""

    @property
    def has_virtual(self) -> bool:
        """Whether there is anything to plan virtual mode by."""
        return bool(self.layers) or self.paths is not None

    def loss(self, slots: Sequence[int]) -> float:
        """Expected divergence of virtual mode with so many slots in each layer, nats a token."""
        if self.paths is not None:
            return self.paths.loss(min(slots))
        return sum(curve.loss(count) for curve, count in zip(self.layers, slots, strict=True))


class Profile(_Part, frozen=True):
    version: int
    store_id: str
    record_bytes: list[int]
    """By MoE layer, as the next."""
    num_experts: list[int]
    top_k: int
    box: BoxProfile
    memory: MemoryProfile
    model: ModelProfile

    @property
    def expert_bytes(self) -> int:
        """Of all experts."""
        return sum(nbytes * count for nbytes, count in zip(self.record_bytes, self.num_experts, strict=True))

    def curve(self, routing: str) -> MissCurve:
        """Raises StoreError for a routing that was not profiled."""
        found = {curve.routing: curve for curve in self.model.misses}
        if routing not in found:
            others = ", ".join(found)
            raise StoreError(f"routing {routing!r} was not profiled: there are {others} (`profile --routing` adds one)")
        return found[routing]


def decode_profile(data: bytes, store_id: str) -> Profile:
    """Raises StoreError for what is no profile of the store with that id."""
    try:
        profile = msgspec.json.decode(data, type=Profile)
    except msgspec.DecodeError as error:
        raise StoreError(f"{PROFILE_NAME} is not a profile of this version: {error}; profile again") from error
    if profile.version != PROFILE_VERSION or profile.store_id != store_id:
        raise StoreError(f"{PROFILE_NAME} belongs to another store or version; profile again with `expertd profile`")
    return profile


def _between(xs: list[int] | list[float], ys: list[float], x: float) -> float:
    """Of the polygon through (xs, ys), flat outside."""
    at = bisect_left(xs, x)
    if at == 0:
        return ys[0]
    if at == len(xs):
        return ys[-1]
    part = (x - xs[at - 1]) / (xs[at] - xs[at - 1])
    return ys[at - 1] + part * (ys[at] - ys[at - 1])


def at_share(curve: MissCurve, share: float) -> tuple[float, list[float]]:
    """Hit rate and missing experts (as `MissCurve.missing`) at a share of all experts."""
    width = max(map(len, curve.missing))
    columns = [[row[n] if n < len(row) else 0.0 for row in curve.missing] for n in range(width)]
    return _between(curve.shares, curve.hit_rates, share), [_between(curve.shares, c, share) for c in columns]
