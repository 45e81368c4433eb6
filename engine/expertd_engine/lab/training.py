"""Trains a predictor on a trace with hidden states, layer by layer. Owns the objective.

Two things are learned of each layer: which experts the next layers will use (a low-rank map that begins as those
layers' own gates), and how soon its own experts come again. Both know what was used of late.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from expertd_engine.console import Progress, silent
from expertd_engine.errors import UsageError
from expertd_engine.lab.predictor_file import Predictor, Recent
from expertd_engine.lab.trace import Trace
from expertd_engine.model.gates import Gate

HALF_LIVES = (1.0, 4.0, 16.0, 64.0, 400.0)
SOON_TOKENS = 8.0
"""A next use d tokens ahead counts 1 ÷ (1 + (d - 1) ÷ this): what is evicted at small budgets comes again after some
tokens, at large ones after many, and this tells both apart."""
_BATCH = 512
_MAP_RATE, _KEEP_RATE, _PLAIN_RATE = 2e-3, 6e-4, 5e-2
"""Highest learning rates: of maps ahead, of maps to what comes again, and of the few numbers beside them."""
_DECAY = 1e-2
_LOGIT_SCALE = 2.5
"""Of a gate's logits, as odds of being chosen, to begin with."""
LEAST_ROWS = 512


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is learned."""

    leads: int = 8
    rank: int = 128
    epochs: int = 6
    seed: int = 0


class History:
    """Which experts each row used, and how often each was used of late: by layer, made when asked for."""

    def __init__(self, trace: Trace) -> None:
        self.layers, self.experts = len(trace.header.experts), trace.header.width
        self.routes = trace.routes
        follows = (np.diff(trace.steps) == 1) & (np.diff(trace.streams) == 0)
        self.follows = np.r_[follows, False]
        """Whether the next row is the next token of the same sequence."""
        self._features: dict[int, NDArray[np.float32]] = {}

    def used(self, layer: int) -> NDArray[np.float32]:
        """`[rows, E]`, one where the row chose the expert."""
        found = np.zeros((len(self.routes), self.experts), np.float32)
        np.put_along_axis(found, self.routes[:, layer], 1.0, axis=1)
        return found

    def features(self, layer: int) -> NDArray[np.float32]:
        """`[rows, J, E]`, after each row's own use."""
        if layer not in self._features:
            recent = Recent(np.array(HALF_LIVES, np.float32), 1, self.experts)
            found = np.empty((len(self.routes), len(HALF_LIVES), self.experts), np.float32)
            for row, chosen in enumerate(self.routes[:, layer]):
                recent.use(0, chosen)
                found[row] = recent.features[0]
            self._features[layer] = found
        return self._features[layer]

    def forget(self, layer: int) -> None:
        self._features.pop(layer, None)

    def soon(self, layer: int) -> NDArray[np.float32]:
        """`[rows, E]`: 1 where the next row uses the expert, falling to 0 with how long it takes."""
        used = self.used(layer)
        found = np.zeros_like(used)
        distance = np.full(self.experts, np.inf, np.float32)
        for row in range(len(used) - 1, -1, -1):
            found[row] = 1 / (1 + (distance - 1) / SOON_TOKENS)
            distance = np.where(used[row] > 0, np.float32(1), distance + 1)
        return found

    def ahead(self, layer: int, lead: int) -> tuple[int, bool]:
        """The layer so far ahead, and whether it is the next token's."""
        further, target = divmod(layer + lead, self.layers)
        return target, bool(further)


def rows_that_lead(history: History) -> NDArray[np.int64]:
    """Rows with a row before and a next token."""
    return np.flatnonzero(history.follows)[1:]


def train(trace: Trace, gates: list[Gate] | None, plan: Plan | None = None, progress: Progress = silent) -> Predictor:
    """Learn from the decoding rows of a trace with hidden states. Raises UsageError for too few of them.

    `gates`: None where the model's are of no use; then the maps begin at random.
    """
    plan = plan or Plan()
    if trace.hidden is None or len(trace) < LEAST_ROWS:
        raise UsageError(f"{len(trace)} decoded tokens with hidden states are too few: record {LEAST_ROWS} or more")
    history = History(trace)
    if plan.leads >= history.layers:
        raise UsageError(f"leads: {plan.leads} is not allowed: the model has {history.layers} MoE layers")
    torch.manual_seed(plan.seed)
    parts = []
    for layer in range(history.layers):
        progress("train", layer / history.layers)
        parts.append(_Layer(trace.hidden[:, layer], history, layer, gates, plan).fit())
        if layer > plan.leads:  # the first ones are the last ones' targets
            history.forget(layer)
    return Predictor(np.array(HALF_LIVES, np.float32), *(np.stack(column) for column in zip(*parts, strict=True)))


class _Layer:
    """What is learned of one layer, on states brought to mean 0 and deviation 1."""

    def __init__(
        self, hidden: NDArray[np.float16], history: History, layer: int, gates: list[Gate] | None, plan: Plan
    ) -> None:
        states = torch.from_numpy(hidden.astype(np.float32))
        self._mean, self._scale = states.mean(0), states.std(0).clamp(min=1e-3)
        self._x = (states - self._mean) / self._scale
        self._history, self._layer, self._plan = history, layer, plan
        self._rows = torch.from_numpy(rows_that_lead(history))
        width, experts = states.shape[1], history.experts
        self._down, self._up, self._bias = self._begin(gates)
        self._recent = torch.full((plan.leads, len(HALF_LIVES)), 0.1)
        self._keep = torch.zeros(width, experts)
        self._keep_recent = torch.full((len(HALF_LIVES),), 0.1)
        self._keep_bias = torch.full((experts,), 0.5)

    def _begin(self, gates: list[Gate] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Low-rank maps: of the gates ahead, what the states that were seen tell apart."""
        plan, (width, experts) = self._plan, (self._x.shape[1], self._history.experts)
        rank = min(plan.rank, width, plan.leads * experts)
        if gates is None:
            down = torch.randn(width, rank) / width**0.5
            return down, torch.zeros(rank, plan.leads, experts), torch.full((plan.leads, experts), -2.0)
        seen = [
            gates[self._history.ahead(self._layer, lead)[0]].seen_from(gates[self._layer])[0]
            for lead in range(1, plan.leads + 1)
        ]
        matrix = torch.from_numpy(np.concatenate([np.pad(m, ((0, experts - len(m)), (0, 0))) for m in seen]))
        matrix = matrix * self._scale
        root = torch.linalg.cholesky(self._x.T @ self._x / len(self._x) + 1e-3 * torch.eye(width))
        left, values, right = torch.linalg.svd(matrix @ root, full_matrices=False)
        scale = _LOGIT_SCALE / (values.square().sum() / len(matrix)).sqrt().clamp(min=1e-6)
        up = (scale * left[:, :rank] * values[:rank]).T.reshape(rank, plan.leads, experts)
        down = torch.linalg.solve_triangular(root.T, right[:rank].T, upper=True)
        return down, up.contiguous(), torch.full((plan.leads, experts), -2.0)

    def fit(self) -> tuple[NDArray[np.float32], ...]:
        """Learn; the arrays of `Predictor` for this layer, on states as they come."""
        loss = self._objective()
        maps, plain = [self._down, self._up], [self._recent, self._bias, self._keep_recent, self._keep_bias]
        groups = [
            {"params": maps, "weight_decay": _DECAY},
            {"params": [self._keep], "weight_decay": _DECAY},
            {"params": plain, "weight_decay": 0.0},
        ]
        for one in (*maps, self._keep, *plain):
            one.requires_grad_(True)
        steps = max(20, self._plan.epochs * len(self._rows) // _BATCH)
        optimiser = torch.optim.AdamW(groups, lr=_KEEP_RATE)
        rates = [_MAP_RATE, _KEEP_RATE, _PLAIN_RATE]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=steps)
        for _ in range(steps):
            optimiser.zero_grad()
            loss(self._rows[torch.randint(len(self._rows), (_BATCH,))]).backward()
            optimiser.step()
            schedule.step()
        return self._unscaled()

    def _objective(self) -> Callable[[Tensor], Tensor]:
        history, layer = self._history, self._layer
        ahead = [history.ahead(layer, lead) for lead in range(1, self._plan.leads + 1)]
        used = [torch.from_numpy(history.used(target)) for target, _ in ahead]
        features = [torch.from_numpy(history.features(target)) for target, _ in ahead]
        soon, own = torch.from_numpy(history.soon(layer)), torch.from_numpy(history.features(layer))

        def loss(rows: Tensor) -> Tensor:
            x = self._x[rows]
            logits = torch.einsum("br,rde->bde", x @ self._down, self._up) + self._bias
            # A layer of this token has not been used by it yet; the next token's has by this one.
            known = torch.stack([f[rows if n else rows - 1] for f, (_, n) in zip(features, ahead, strict=True)], 1)
            targets = torch.stack([u[rows + 1 if n else rows] for u, (_, n) in zip(used, ahead, strict=True)], 1)
            logits = logits + torch.einsum("bdje,dj->bde", known, self._recent)
            again = x @ self._keep + torch.einsum("bje,j->be", own[rows], self._keep_recent) + self._keep_bias
            return cross_entropy(logits, targets) + cross_entropy(again, soon[rows])

        return loss

    def _unscaled(self) -> tuple[NDArray[np.float32], ...]:
        with torch.no_grad():
            down, keep = self._down / self._scale[:, None], self._keep / self._scale[:, None]
            bias = self._bias - torch.einsum("r,rde->de", self._mean @ down, self._up)
            keep_bias = self._keep_bias - self._mean @ keep
        found = (down, self._up, self._recent, bias, keep, self._keep_recent, keep_bias)
        return tuple(one.detach().numpy() for one in found)
