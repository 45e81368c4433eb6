"""How much of what layers ahead will use each predictor names: recall at k and at k + 3, by layer and lead. numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertd_engine.lab.predictor_file import Predictor
from expertd_engine.lab.trace import Ids, Trace
from expertd_engine.lab.training import History, rows_that_lead
from expertd_engine.model.gates import Gate

Floats = NDArray[np.float32]
MORE = 3
"""Experts named beyond k, for the second figure."""


@dataclass(frozen=True, slots=True, eq=False)
class Recall:
    """Of one predictor: `[layers, leads]`, by the layer that foresees."""

    name: str
    at_k: Floats
    at_more: Floats


def recalls(
    trace: Trace, gates: Sequence[Gate] | None, predictor: Predictor | None, leads: int = 8, skip: int = 0
) -> list[Recall]:
    """On all decoding rows of a trace with hidden states, after the first `skip`."""
    history = History(trace)
    rows = rows_that_lead(history)
    rows = rows[rows >= skip]
    names = ["previous token", *(["next gate"] if gates else []), *(["learned"] if predictor else [])]
    found = {name: np.zeros((2, history.layers, leads), np.float32) for name in names}
    for layer in range(history.layers):
        for lead in range(1, leads + 1):
            target, next_token = history.ahead(layer, lead)
            truth = history.routes[rows + 1 if next_token else rows, target]
            known = history.features(target)[rows if next_token else rows - 1]
            for name in names:
                scores = _scores(name, trace, rows, (layer, lead, target), known, gates, predictor)
                found[name][:, layer, lead - 1] = _recall(scores, truth, trace.header.top_k)
    return [Recall(name, *both) for name, both in found.items()]


def _scores(
    name: str,
    trace: Trace,
    rows: Ids,
    where: tuple[int, int, int],
    known: Floats,
    gates: Sequence[Gate] | None,
    predictor: Predictor | None,
) -> Floats:
    """`[rows, E]`."""
    layer, lead, target = where
    if name == "previous token":
        return known[:, 0] + 1e-3 * known[:, -1]
    assert trace.hidden is not None, "the trace has no hidden states"
    states = trace.hidden[rows, layer].astype(np.float32)
    if name == "next gate":
        assert gates is not None
        matrix, bias = gates[target].seen_from(gates[layer])
        return np.asarray(states @ matrix.T + bias)
    assert predictor is not None
    scores = states @ predictor.down[layer] @ predictor.up[layer][:, lead - 1] + predictor.bias[layer, lead - 1]
    return np.asarray(scores + np.einsum("bje,j->be", known, predictor.recent[layer, lead - 1]))


def _recall(scores: Floats, truth: Ids, k: int) -> tuple[float, float]:
    most = min(k + MORE, scores.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :most]
    right = (order[:, :, None] == truth[:, None, :]).any(axis=2)
    return float(right[:, :k].sum() / truth.size), float(right.sum() / truth.size)
