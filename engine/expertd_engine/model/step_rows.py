"""A step as whoever computes it takes it: one row for each token, sequence after sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence in this step: `rows` `[row, row + length)` of the batch at positions from
    `start` on. `blocks` is the sequence's block table."""

    row: int
    start: int
    length: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepRows:
    """Token `ids[r]` stands at `positions[r]` of its sequence; `spans` say whose rows are whose, in their order."""

    ids: Sequence[int]
    positions: Sequence[int]
    spans: Sequence[Span]
    logit_rows: Sequence[int]
    """Whose logits are asked for."""
