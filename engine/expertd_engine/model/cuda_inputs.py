"""What a step is told, in memory that never moves: tokens, positions, block tables. Owns their pinned twin.

A captured step reads these very addresses, so that filling them anew and launching it again is a new step. All numbers
lie in one int32 tensor, which the step itself takes over first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from expertd_engine.kernels.given import take_step
from expertd_engine.model.sampler import Draw
from expertd_engine.model.step_rows import Span

_NO_DRAWS: Mapping[int, Draw] = MappingProxyType({})
PADDING = -1
"""Position of a row that is none: it writes no keys, attends to nothing and reaches no expert."""


class StepInputs:
    """Room for steps of up to `rows` tokens of up to `sequences` sequences with block tables of up to `blocks`."""

    def __init__(self, rows: int, sequences: int, blocks: int, device: torch.device) -> None:
        self.rows, self.sequences = rows, sequences
        each = ("ids", "positions", "row_table", "limits", "temperatures", "least", "words")
        sizes = {"num_rows": 1, "turn": 1} | dict.fromkeys(each, rows)
        self._ids = slice(2, 2 + rows)
        """Where they lie among all numbers."""
        total = sum(sizes.values()) + sequences * blocks
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        mine, theirs = _parts(self._host, sizes), _parts(self._device, sizes)
        self.num_rows, self.ids, self.positions = theirs["num_rows"], theirs["ids"], theirs["positions"]
        """`[1]` real rows; `[rows]` token ids; `[rows]` positions, `PADDING` beyond the real ones."""
        self.turn = theirs["turn"]
        """`[1]`: 0 and 1 by turns."""
        self.row_table = theirs["row_table"]
        """`[rows]` which block table a row's sequence has."""
        self.limits = theirs["limits"].view(torch.float32)
        """float32 `[rows]`: in virtual mode, the share of a row's weights that may be substituted."""
        self.draws = theirs["temperatures"].view(torch.float32), theirs["least"].view(torch.float32), theirs["words"]
        """`[rows]` each: how a row's token is drawn from its logits, as `kernels.cuda.draw.Drawing` takes it."""
        self.tables = theirs["rest"].view(sequences, blocks)
        """`[sequences, blocks]`; what lies beyond a sequence's end is of others, and read by nobody."""
        self._mine = {name: part.numpy() for name, part in mine.items()}
        self._tables = self._mine.pop("rest").reshape(sequences, blocks)
        self._limits, self._temperatures, self._least = (
            self._mine.pop(name).view(np.float32) for name in ("limits", "temperatures", "least")
        )
        self._words = self._mine.pop("words").view(np.uint32)
        self._mine["positions"][:] = PADDING
        self._used = 0
        """Rows that the step before had."""
        self._drew: Iterable[int] = ()
        """Those of them that drew."""
        self._told: list[list[int]] = [[] for _ in range(sequences)]
        """What each block table says, as far as it was told."""

    def fill(
        self, token_ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], limits: Sequence[float] = (),
        draws: Mapping[int, Draw] = _NO_DRAWS,
    ) -> int:  # fmt: skip
        """Write down one step, for the next `take`: its turn. An id of -1 - r: the token that row r of the step before
        brings. `limits`: in virtual mode. `draws`: by row; the others take the best.

        The step before has taken its own.
        """
        count, mine, words = len(token_ids), self._mine, self._words
        assert count <= self.rows and len(spans) <= self.sequences
        ids, places = mine["ids"], mine["positions"]
        if count < self._used:
            ids[count : self._used], places[count : self._used] = 0, PADDING
        mine["num_rows"][0] = self._used = count
        ids[:count], places[:count] = token_ids, positions
        if limits:
            self._limits[: len(limits)] = limits
        for row in self._drew:
            self._temperatures[row] = 0.0
        for row, draw in draws.items():
            self._temperatures[row], self._least[row] = draw.temperature, draw.least
            words[row] = draw.word
        self._drew = tuple(draws)
        for index, span in enumerate(spans):
            mine["row_table"][span.row : span.row + span.length] = index
            if self._told[index] != span.blocks:  # most steps go on in the block that they had
                self._tables[index, : len(span.blocks)] = span.blocks
                self._told[index] = list(span.blocks)
        turn = mine["turn"][0] = 1 - mine["turn"][0]
        return int(turn)

    def take(self, brought: Tensor) -> None:
        """The first work of a step, on the current stream; `brought` int64 `[R]`: tokens of the step before, by its
        rows. May be captured in a graph."""
        take_step(self._host, self._device, self._ids, brought)


def _parts(whole: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Consecutive pieces of `whole`; what is left is called `rest`."""
    *pieces, rest = whole.split([*sizes.values(), len(whole) - sum(sizes.values())])
    return dict(zip(sizes, pieces, strict=True)) | {"rest": rest}
