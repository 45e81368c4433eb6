"""Graphs are launched again and again: what they were captured of stays. A stand-in for the driver captures nothing."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from expertd_engine.model.cuda_graph import GraphLauncher


class Graph:
    """Of a driver that is not there."""

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        return None


class Experts:
    """Whose memory kernels are told of when they are captured, and nobody else keeps."""

    def run(self, rows: int) -> None:
        """A program."""


def nothing(*arguments: Any, **named: Any) -> None:
    return None


def test_what_a_graph_was_captured_of_lives_as_long_as_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Event", "synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *arguments, **named: nullcontext())
    experts = Experts()
    kept = weakref.ref(experts)
    launcher = GraphLauncher(experts.run, [1, 2])
    del experts
    gc.collect()
    assert kept() is not None  # or its memory is somebody else's when the graph writes there
    launcher.launch(2)
    del launcher
    gc.collect()
    assert kept() is None
