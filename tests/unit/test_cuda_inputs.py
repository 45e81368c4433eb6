"""What a step is told is there whatever the steps before it were told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from expertd_engine.model.cuda_inputs import PADDING, StepInputs
from expertd_engine.model.step_rows import Span

ROWS, SEQUENCES, BLOCKS = 6, 2, 3
SPANS = st.lists(
    st.tuples(st.integers(1, ROWS // SEQUENCES), st.integers(0, 5), st.lists(st.integers(0, 9), max_size=BLOCKS)),
    max_size=SEQUENCES,
)
"""Of each sequence: rows, the first one's position, the block table."""


@given(st.lists(st.tuples(SPANS, st.booleans()), min_size=1, max_size=8))
def test_each_step_is_told_anew(steps: Sequence[tuple[list[tuple[int, int, list[int]]], bool]]) -> None:
    inputs = StepInputs(ROWS, SEQUENCES, BLOCKS, torch.device("cpu"))
    tables: list[list[int]] = [[] for _ in range(SEQUENCES)]  # changed in place, as a sequence's is
    for number, (told, has_limits) in enumerate(steps):
        spans: list[Span] = []
        positions: list[int] = []
        owners: list[int] = []
        for index, (length, start, blocks) in enumerate(told):
            tables[index][:] = blocks
            spans.append(Span(len(positions), start, length, tables[index]))
            positions += range(start, start + length)
            owners += [index] * length
        count = len(positions)
        ids = [100 * number + row for row in range(count)]
        limits = [0.25 * (number + row) for row in range(count)] if has_limits else []
        unseen = [row for row in range(count) if row % 3 == number % 3]  # of which the step before brings the token
        brought = torch.tensor([100 * number + row for row in reversed(range(ROWS))])
        told_ids = [row - ROWS if row in unseen else one for row, one in enumerate(ids)]
        assert inputs.fill(told_ids, positions, spans, limits) == (number + 1) % 2
        inputs.take(brought)
        assert inputs.turn.tolist() == [(number + 1) % 2]
        assert inputs.num_rows.tolist() == [count]
        assert inputs.ids.tolist() == ids + [0] * (ROWS - count)
        assert inputs.positions.tolist() == positions + [PADDING] * (ROWS - count)
        assert inputs.row_table[:count].tolist() == owners
        assert inputs.limits[: len(limits)].tolist() == limits
        for index, (_, _, blocks) in enumerate(told):
            assert inputs.tables[index, : len(blocks)].tolist() == blocks
