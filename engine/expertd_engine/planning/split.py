"""Which layer of virtual mode gets how many slots. Pure.

Two answers are made and the better one is taken. Slot after slot goes where a byte saves most expected divergence,
along the lower hull of what was measured: on convex losses this is optimal, and layers that are alike get as many. A
dynamic program is optimal among the measured numbers of slots whatever the shape; what it leaves over goes where it
saves most.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from expertd_engine.planning.profile import LayerCurve

_CELLS = 20_000
"""Of the dynamic program's table, at most: records of uneven lengths are rounded up to such a part of the room."""
_BETTER = 1 - 1e-9


@dataclass(frozen=True, slots=True)
class Gain:
    """The last slot that a layer was given, or the last path: nats of divergence saved for each token."""

    layer: int | None
    """None: a whole path, a slot in every layer."""
    slots: int
    """That the layer, or every layer, has with it."""
    saved: float


def split_slots(curves: Sequence[LayerCurve], record_bytes: Sequence[int], room: int) -> list[int]:
    """Slots of each layer inside `room` bytes, at least the fewest of each curve."""
    found = _along_hulls(curves, record_bytes, room)
    other = _fill(curves, record_bytes, room, _at_measured(curves, record_bytes, room))
    return other if _loss(curves, other) < _BETTER * _loss(curves, found) else found


def last_gains(curves: Sequence[LayerCurve], slots: Sequence[int]) -> list[Gain]:
    """Of each layer that has more than the fewest."""
    return [
        Gain(layer, count, curve.loss(count - 1) - curve.loss(count))
        for layer, (curve, count) in enumerate(zip(curves, slots, strict=True))
        if count > curve.slots[0]
    ]


def _loss(curves: Sequence[LayerCurve], slots: Sequence[int]) -> float:
    return sum(curve.loss(count) for curve, count in zip(curves, slots, strict=True))


def _left(record_bytes: Sequence[int], slots: Sequence[int], room: int) -> int:
    return room - sum(count * nbytes for count, nbytes in zip(slots, record_bytes, strict=True))


# ---------------------------------------------------------------- convex losses


def _along_hulls(curves: Sequence[LayerCurve], record_bytes: Sequence[int], room: int) -> list[int]:
    """Greedy on convex hulls. Of equal gains the layer with fewest slots comes first."""
    hulls = [_hull(curve) for curve in curves]
    slots = [curve.slots[0] for curve in curves]
    left = _left(record_bytes, slots, room)
    heap = [
        (-hull[0] / nbytes, slots[i], i)
        for i, (hull, nbytes) in enumerate(zip(hulls, record_bytes, strict=True))
        if hull
    ]
    heapq.heapify(heap)
    while heap:
        _, count, layer = heapq.heappop(heap)
        if record_bytes[layer] > left:
            continue  # a layer of shorter records may still have room
        left -= record_bytes[layer]
        slots[layer] = count + 1
        following = slots[layer] - curves[layer].slots[0]
        if following < len(hulls[layer]):
            heapq.heappush(heap, (-hulls[layer][following] / record_bytes[layer], slots[layer], layer))
    return slots


def _hull(curve: LayerCurve) -> list[float]:
    """What each slot beyond the fewest saves, on the lower convex hull of the losses: never growing, never below 0."""
    points: list[tuple[int, float]] = []
    for count, mass in zip(curve.slots, curve.mass, strict=True):
        point = (count, curve.sensitivity * mass)
        while len(points) > 1 and _above(points[-2], points[-1], point):
            points.pop()
        points.append(point)
    saved: list[float] = []
    for (x, y), (to_x, to_y) in pairwise(points):
        saved += [max(0.0, (y - to_y) / (to_x - x))] * (to_x - x)
    return saved


def _above(first: tuple[int, float], middle: tuple[int, float], last: tuple[int, float]) -> bool:
    """Whether `middle` lies on or above the line between its neighbours."""
    return (middle[1] - first[1]) * (last[0] - first[0]) >= (last[1] - first[1]) * (middle[0] - first[0])


# ---------------------------------------------------------------- any losses


def _at_measured(curves: Sequence[LayerCurve], record_bytes: Sequence[int], room: int) -> list[int]:
    """The best split whose every layer has a measured number of slots: a multiple-choice knapsack, layer by layer."""
    cell = max(math.gcd(*record_bytes), -(-room // _CELLS))
    cells = room // cell
    best = [0.0] * (cells + 1)
    chosen: list[list[int]] = []
    for curve, nbytes in zip(curves, record_bytes, strict=True):
        longer = [math.inf] * (cells + 1)
        choice = [-1] * (cells + 1)
        for count in curve.slots:
            loss, size = curve.loss(count), -(-count * nbytes // cell)
            for at, before in enumerate(best[: max(0, cells + 1 - size)], size):
                if before + loss < longer[at]:
                    longer[at], choice[at] = before + loss, count
        best = longer
        chosen.append(choice)
    if best[cells] == math.inf:  # rounded up, not even the fewest fit
        return [curve.slots[0] for curve in curves]
    slots, at = [], cells
    for choice, nbytes in zip(reversed(chosen), reversed(record_bytes), strict=True):
        slots.append(choice[at])
        at -= -(-slots[-1] * nbytes // cell)
    return slots[::-1]


def _fill(curves: Sequence[LayerCurve], record_bytes: Sequence[int], room: int, slots: list[int]) -> list[int]:
    """Give what is left where it saves most."""
    left = _left(record_bytes, slots, room)
    while True:
        fitting = [
            ((curve.loss(count) - curve.loss(count + 1)) / nbytes, -count, layer)
            for layer, (curve, count, nbytes) in enumerate(zip(curves, slots, record_bytes, strict=True))
            if nbytes <= left and count < curve.slots[-1]
        ]
        if not fitting:
            return slots
        layer = max(fitting)[2]
        slots[layer] += 1
        left -= record_bytes[layer]
