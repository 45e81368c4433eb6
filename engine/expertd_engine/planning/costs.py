"""What missing experts cost a decode step, fitted to steps that were timed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expertd_engine.planning.planner import missing_s


@dataclass(frozen=True, slots=True)
class Step:
    """One that may have missed something: seconds beyond a step that misses nothing, and as `MissCurve.missing` how
    many layers missed how much."""

    extra_s: float
    missing: Sequence[float]


def fit_costs(steps: Iterable[Step], reads_s: Sequence[float]) -> tuple[float, float]:
    """`BoxProfile.leave_s` and `overlap` by least squares, neither below 0; (0, 0) where no step missed anything."""
    squares = [0.0, 0.0, 0.0]  # of layers, of seconds of reading, and both multiplied
    layers_extra = reads_extra = 0.0
    for step in steps:
        layers, reading = sum(step.missing), missing_s(step.missing, reads_s)
        squares = [squares[0] + layers**2, squares[1] + reading**2, squares[2] + layers * reading]
        layers_extra, reads_extra = layers_extra + layers * step.extra_s, reads_extra + reading * step.extra_s
    if not squares[0]:
        return 0.0, 0.0
    determinant = squares[0] * squares[1] - squares[2] ** 2
    if determinant > 1e-9 * squares[0] * squares[1]:
        leave_s = (layers_extra * squares[1] - reads_extra * squares[2]) / determinant
        overlap = (reads_extra * squares[0] - layers_extra * squares[2]) / determinant
        if min(leave_s, overlap) >= 0:
            return leave_s, overlap
    # On the border: the one cause that explains more alone.
    leave_s, overlap = max(0.0, layers_extra / squares[0]), max(0.0, reads_extra / squares[1])
    return (leave_s, 0.0) if leave_s * layers_extra > overlap * reads_extra else (0.0, overlap)
