"""Foresees routes from what routers see, while a step runs: which experts later layers use, which come again soon.

A `Lookahead` that looks on at every layer. Hints name absent experts alone, with how sure the predictor is: the
governor decides which are worth a load. What is told never changes a token, only when bytes move.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import Exactness
from expertd_engine.experts.payoff import PayOff
from expertd_engine.lab.predictor_file import Predictor, Recent
from expertd_engine.model.gates import Gate
from expertd_engine.model.moe import FEW_ROWS

Floats: TypeAlias = NDArray[np.float32]

LEADS = 4
"""Layers ahead that are foreseen while serving: loads further ahead seldom find the link idle."""
_MORE = 3
"""Experts named beyond top-k for each row and layer."""


_UNSEEN_STEPS = 64
"""Steps without predictions that are remembered: older uses weigh little."""


class Source(Protocol):
    """Scores of experts from what a layer's router saw. `E` is the width of the widest layer."""

    leads: int
    least_trust: int
    """Below which nothing is named: it would never be followed."""

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

    least_trust = 4  # as the last one chosen

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
        return np.asarray(np.clip(4 * above + 4, 0, 15), np.int64)

    def again(self, layer: int, x: Floats) -> Floats | None:
        return None


class Learned:
    """What `expertd train-predictor` has learned."""

    least_trust = 10  # as likely as not

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
        return np.asarray(logits + (known + numbers.bias[layer, : self.leads])).swapaxes(0, 1)

    def trust(self, logits: Floats, kth: Floats) -> NDArray[np.int64]:
        """The probability that it learned to give, in twentieths."""
        return np.asarray(20 / (1 + np.exp(-np.clip(logits, -30, 30))), np.int64)

    def again(self, layer: int, x: Floats) -> Floats:
        numbers = self._numbers
        own = (x @ numbers.keep[layer]).max(axis=0)
        return np.asarray(own + self._recent.features[layer].T @ numbers.keep_recent[layer] + numbers.keep_bias[layer])


class PredictorWatch:
    """Looks on at every layer and asks the source. `slots_of(layer)` is the live table of resident experts.

    `rescore(layer, logits [E])` is told what comes again soon, where the source knows.
    """

    def __init__(
        self,
        source: Source,
        experts: Sequence[int],
        top_k: int,
        slots_of: Callable[[int], array[int]],
        rescore: Callable[[int, Floats], None] | None = None,
    ) -> None:
        """`experts` of each layer."""
        self.source = source
        self.named: list[tuple[int, int, int]] = []
        """Lead, expert and trust, of the layer routed last: absent experts alone, soonest first."""
        self.payoff: PayOff | None = None
        """While it says that predictions do not pay, none is made, and until it is to try them again, none is prepared
        for; None: they always are."""
        self._experts, self._width, self._top_k = experts, max(experts), top_k
        self._slots = [np.frombuffer(slots_of(layer), np.int64) for layer in range(len(experts))]
        self._rescore = rescore
        self._unseen = deque[tuple[int, NDArray[np.int64]]](maxlen=_UNSEEN_STEPS * len(experts))
        """What was used while nothing was asked of the source, which it is told before it is asked again."""
        self._rows: slice | NDArray[np.int64] = slice(None)

    def begin_step(self, streams: Sequence[int], decode: Sequence[bool]) -> bool:
        """Of a prompt's rows the last alone matters to what comes after; a step that scans is not foreseen."""
        if self._rescore is None and self.payoff is not None and not self.payoff.is_near:
            return False
        rows = np.flatnonzero(decode)
        self._rows = slice(None) if len(rows) == len(decode) else rows if len(rows) else slice(-1, None)
        self.named = []
        return len(rows) <= FEW_ROWS

    @property
    def sees_hidden(self) -> bool:
        """Not while nothing is asked of the source but to keep count."""
        return self._rescore is not None or self._predicts

    @property
    def _predicts(self) -> bool:
        return self.payoff is None or self.payoff.is_on

    def routed(self, layer: int, chosen: NDArray[np.int64], hidden: torch.Tensor | None) -> None:
        uses = chosen[self._rows].ravel()
        if not self.sees_hidden:
            self._unseen.append((layer, uses.copy()))
            return
        self._catch_up()
        self.source.use(layer, uses)
        assert hidden is not None, "layers ran on without their predictor"
        x = hidden.float().numpy()[self._rows]
        if self._predicts:
            self.named = self._name(layer, x)
        if self._rescore is not None and (scores := self.source.again(layer, x)) is not None:
            self._rescore(layer, scores[: self._experts[layer]])

    def end_step(self, *, well: bool) -> None:
        self.named = []

    def missed(self, chosen: Iterable[NDArray[np.int64]]) -> None:
        """A step of decodes has run at which nobody looked on, whose rows chose these in each layer, with repeats."""
        self._unseen.extend((layer, uses.ravel()) for layer, uses in enumerate(chosen))
        if self.sees_hidden:
            self._catch_up()

    def _catch_up(self) -> None:
        while self._unseen:
            self.source.use(*self._unseen.popleft())

    def _name(self, layer: int, x: Floats) -> list[tuple[int, int, int]]:
        targets = [(layer + lead) % len(self._slots) for lead in range(1, self.source.leads + 1)]
        absent = np.zeros((len(targets), self._width), bool)
        for row, target in zip(absent, targets, strict=True):
            np.less(self._slots[target], 0, out=row[: len(self._slots[target])])
        if not absent.any():
            return []
        logits = self.source.ahead(layer, x)
        ordered = np.partition(logits, (self._width - self._more, self._width - self._top_k), axis=-1)
        kth = ordered[..., self._width - self._top_k, None]
        likely = (logits >= ordered[..., self._width - self._more, None]) & absent[:, None, :]
        leads, experts = np.nonzero(likely.any(axis=1))
        if not len(leads):
            return []
        trust = self.source.trust(logits, kth)
        sure = np.where(likely, trust, -1).max(axis=1)[leads, experts].tolist()
        named = zip((leads + 1).tolist(), experts.tolist(), sure, strict=True)
        return [one for one in named if one[2] >= self.source.least_trust]

    @property
    def _more(self) -> int:
        return min(self._top_k + _MORE, self._width)


class PredictedRoutes:
    """The `Lookahead` that a `PredictorWatch` sees for: what it names, as hints."""

    exactness: Exactness = "predicted"

    def __init__(self, watch: PredictorWatch, layers: int, experts: int) -> None:
        """`experts`: of the widest layer."""
        self._watch = watch
        self._layers, self._experts = layers, experts

    def begin_step(self, step: int, token_ids: Sequence[int]) -> Iterable[Hint]:
        return ()

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> Iterable[Hint]:
        now = step * self._layers + layer
        named, self._watch.named = self._watch.named, []
        return [
            Hint(ExpertId((layer + lead) % self._layers, expert), (now + lead) * self._experts + expert, trust)
            for lead, expert, trust in named
        ]

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return None
