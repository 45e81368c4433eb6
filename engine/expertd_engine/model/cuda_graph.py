"""Launches a step's program: as a CUDA graph for each number of rows, or, where none can be captured, as it stands.
Owns graphs.

Numbers of rows are powers of two: a step of three rows runs the graph for four, its last row being padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

LARGEST_BUCKET = 32


def buckets(most_rows: int) -> list[int]:
    """Powers of two up to what `most_rows` rows need, at most `LARGEST_BUCKET`."""
    top = min(LARGEST_BUCKET, 1 << max(0, most_rows - 1).bit_length())
    return [1 << power for power in range(top.bit_length())]


def bucket_of(rows: int) -> int:
    """The smallest power of two that holds so many."""
    return 1 << (rows - 1).bit_length()


class Launcher(Protocol):
    """Runs a program on the device."""

    def launch(self, rows: int) -> None:
        """Start the program for `rows` rows, one of the buckets. Does not wait."""
        ...


class EagerLauncher:
    """Launches kernel by kernel. On a CPU everything has ended when `launch` returns."""

    def __init__(self, program: Callable[[int], None], rows: Sequence[int], device: torch.device) -> None:
        """On a card, runs the program once for each bucket, which compiles its kernels; as `GraphLauncher` does."""
        self._program = program
        if device.type != "cpu":
            for bucket in sorted(rows, reverse=True):
                program(bucket)
            torch.cuda.synchronize()

    def launch(self, rows: int) -> None:
        self._program(rows)


class GraphLauncher:
    """One captured graph for each bucket, launched on the stream that is current then."""

    def __init__(self, program: Callable[[int], None], rows: Sequence[int]) -> None:
        """Runs the program once for each bucket, which compiles its kernels, then captures it. What the steps' inputs
        say at the moment is computed: the caller has made all rows padding."""
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._program = program
        """Kept: graphs know addresses alone, and whatever lies there is to stay."""
        for bucket in sorted(rows, reverse=True):  # the largest first: the others find room in its memory
            program(bucket)
            torch.cuda.synchronize()
            self._graphs[bucket] = self._captured(program, bucket)

    def launch(self, rows: int) -> None:
        self._graphs[rows].replay()

    def _captured(self, program: Callable[[int], None], rows: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            program(rows)
        return graph
