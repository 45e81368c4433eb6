"""Foresees routes from what routers see, while a step runs: which experts later layers use, which come again soon.

A `Lookahead` that looks on at every layer. Hints name absent experts alone, with how sure the predictor is: the
governor decides which are worth a load. What is told never changes a token, only when bytes move.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import Exactness
from expertd_engine.lab.predictor_file import Predictor, Recent
from expertd_engine.model.gates import Gate
from expertd_engine.model.moe import FEW_ROWS

Floats: TypeAlias = NDArray[np.float32]

LEADS = 4
"""Layers ahead that are foreseen while serving: loads further ahead seldom find the link idle."""
_MORE = 3
"""Experts named beyond top-k for each row and layer."""


class Source(Protocol):
    """Scores of experts from what a layer's router saw. `E` is the width of the widest layer."""

    leads: int

    def use(self, layer: int, chosen: NDArray[np.int64]) -> None:
        """The step's rows chose these in `layer`, with repeats."""
        ...

    def ahead(self, layer: int, x: Floats) -> Floats:
        """Logits `[D, T, E]` of the next layers for rows `x` `[T, H]`."""
        ...

    def trust(self, logits: Floats, kth: Floats) -> NDArray[np.int64]:
        """How sure `logits` `[D, T, E]` are, from 0 up, where the k-th of each row is `kth` `[D, T, 1]`."""
        ...

    def again(self, layer: int, x: Floats) -> Floats | None:
        """Logits `[E]` that an expert of `layer` is used again soon; None where nothing is known."""
        ...


class NextGate:
    """The next layers' own norms and gates, asked about the present state. For any family with linear routers."""

    def __init__(self, gates: Sequence[Gate], leads: int = LEADS) -> None:
        self.leads = min(leads, len(gates) - 1)
        self._experts = max(len(gate.weight) for gate in gates)
        self._maps = [self._joined(gates, layer) for layer in range(len(gates))]

    def _joined(self, gates: Sequence[Gate], layer: int) -> tuple[Floats, Floats]:
        """Matrix `[H, D × E]` and bias of the layers after this one; a narrow layer's missing experts get no chance."""
        matrices, biases = [], []
        for lead in range(1, self.leads + 1):
            matrix, bias = gates[(layer + lead) % len(gates)].seen_from(gates[layer])
            short = self._experts - len(bias)
            matrices.append(np.pad(matrix, ((0, short), (0, 0))))
            biases.append(np.pad(bias, (0, short), constant_values=-1e30))
        return np.ascontiguousarray(np.concatenate(matrices).T, np.float32), np.concatenate(biases)

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix, _ in self._maps)

    def use(self, layer: int, chosen: NDArray[np.int64]) -> None:
        return None

    def ahead(self, layer: int, x: Floats) -> Floats:
        matrix, bias = self._maps[layer]
        return (x @ matrix + bias).reshape(len(x), self.leads, self._experts).swapaxes(0, 1)

    def trust(self, logits: Floats, kth: Floats) -> NDArray[np.int64]:
        """How far above the last one chosen, in quarters of the row's deviation."""
        real = np.maximum(logits, -1e4)
        above = (real - kth) / np.maximum(real.std(axis=-1, keepdims=True), 1e-6)
        return np.clip(4 * above + 4, 0, 15).astype(np.int64)

    def again(self, layer: int, x: Floats) -> Floats | None:
        return None


class Learned:
    """What `expertd train-predictor` has learned."""

    def __init__(self, numbers: Predictor, leads: int = LEADS) -> None:
        self.leads = min(leads, numbers.leads)
        self._numbers = numbers
        layers, _, self._experts = numbers.keep.shape
        self._recent = Recent(numbers.half_lives, layers, self._experts)
        rank = numbers.up.shape[1]
        self._up = [
            np.ascontiguousarray(up[:, : self.leads].reshape(rank, self.leads * self._experts)) for up in numbers.up
        ]

    @property
    def nbytes(self) -> int:
        numbers = self._numbers
        return numbers.down.nbytes + sum(up.nbytes for up in self._up) + numbers.keep.nbytes

    def use(self, layer: int, chosen: NDArray[np.int64]) -> None:
        self._recent.use(layer, chosen)

    def ahead(self, layer: int, x: Floats) -> Floats:
        numbers = self._numbers
        targets = np.arange(layer + 1, layer + 1 + self.leads) % len(numbers.keep)
        known = np.einsum("dje,dj->de", self._recent.features[targets], numbers.recent[layer, : self.leads])
        logits = (x @ numbers.down[layer] @ self._up[layer]).reshape(len(x), self.leads, self._experts)
        return (logits + (known + numbers.bias[layer, : self.leads])).swapaxes(0, 1)

    def trust(self, logits: Floats, kth: Floats) -> NDArray[np.int64]:
        """The probability that it learned to give, in twentieths."""
        return (20 / (1 + np.exp(-np.clip(logits, -30, 30)))).astype(np.int64)

    def again(self, layer: int, x: Floats) -> Floats:
        numbers = self._numbers
        own = (x @ numbers.keep[layer]).max(axis=0)
        return np.asarray(own + self._recent.features[layer].T @ numbers.keep_recent[layer] + numbers.keep_bias[layer])


class HiddenPredictor:
    """The lookahead. `slots_of(layer)` is the live table of resident experts; `rescore` is told what comes again."""

    exactness: Exactness = "predicted"
    sees_hidden = True

    def __init__(
        self,
        source: Source,
        layers: int,
        experts: int,
        top_k: int,
        slots_of: Callable[[int], array[int]],
        rescore: Callable[[int, Floats], None] | None = None,
    ) -> None:
        self.source = source
        self._layers, self._experts, self._top_k = layers, experts, top_k
        self._slots = [np.frombuffer(slots_of(layer), np.int64) for layer in range(layers)]
        self._rescore = rescore
        self._rows: slice | NDArray[np.int64] | None = None
        self._named: list[tuple[int, int, int]] = []
        """Lead, expert and trust, of the layer that has just been routed."""

    # ------------------------------------------------------------ as an onlooker

    def begin_step(self, step: int | Sequence[int], tokens: Sequence[int] | Sequence[bool]) -> Iterable[Hint]:
        """As a lookahead: nothing is known before a layer has routed."""
        self._named = []
        return ()

    def begin_rows(self, decode: Sequence[bool]) -> bool:
        """Rows of a step; of a prompt's the last alone matters to what comes after."""
        rows = np.flatnonzero(decode)
        self._rows = slice(None) if len(rows) == len(decode) else rows if len(rows) else slice(-1, None)
        return len(decode) <= FEW_ROWS or len(rows) <= FEW_ROWS

    def routed_rows(self, layer: int, chosen: NDArray[np.int64], hidden: torch.Tensor | None) -> None:
        """MoE layer `layer` sends rows `[T, H]` to `chosen` `[T, K]`."""
        assert hidden is not None and self._rows is not None, "a predictor looks on at every layer"
        x = hidden.float().numpy()[self._rows]
        self.source.use(layer, chosen[self._rows].ravel())
        self._named = self._name(layer, x)
        if self._rescore is not None and (scores := self.source.again(layer, x)) is not None:
            self._rescore(layer, scores)

    def _name(self, layer: int, x: Floats) -> list[tuple[int, int, int]]:
        logits = self.source.ahead(layer, x)
        most = min(self._top_k + _MORE, logits.shape[-1])
        best = np.argpartition(-logits, most - 1, axis=-1)[..., :most]
        raise NotImplementedError
