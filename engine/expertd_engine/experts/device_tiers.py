"""What crossed a device's link: plain data for status and metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LinkBytes:
    """Bytes that crossed the link, by what for. Cumulative."""

    landed: int = 0
    """Read by kernels, and kept."""
    read: int = 0
    """Read by kernels alone."""
    shared: int = 0
    """Read by kernels, of experts whose other part the processor computed."""
    prefetched: int = 0
    filled: int = 0
    """To fill empty slots."""
    held: int = 0
    """For virtual mode to hold."""
    staged: int = 0
    """Streamed through for steps of many rows."""
