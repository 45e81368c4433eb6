"""The one place that asks for matplotlib: empty figures, and how they are saved."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from expertd_engine.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 120


def need_matplotlib() -> None:
    """Raise UsageError without it: for who would learn of it after minutes of work."""
    if find_spec("matplotlib") is None:
        raise UsageError("pictures need matplotlib: install expertd[bench]")


def new_figure(width: float, height: float) -> Figure:
    """An empty one of so many inches, which needs no display. Raises UsageError without matplotlib."""
    need_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """In the format that the path's suffix names."""
    figure.savefig(path, dpi=_DOTS_PER_INCH)
