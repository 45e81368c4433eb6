"""What crossed a device's link and what lies in its tiers: plain data for status and metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LinkBytes:
    """Bytes that crossed the link, by what for. Cumulative."""

    landed: int = 0
    """Read by kernels, and kept."""
    read: int = 0
    """Read by kernels alone."""
    prefetched: int = 0
    filled: int = 0
    """To fill empty slots."""
    staged: int = 0
    """Streamed through for steps of many rows."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """Where bytes are."""

    device_bytes: int
    """Memory allotted for slots."""
    device_slots: int
    resident: int
    set_aside: int
    host_bytes: int
    host_pinned: bool
    link: LinkBytes
    link_bytes_per_s: float
    """As measured at start."""
    duplicates: int
    """Records that a step landed while they were being copied: their bytes crossed twice."""
