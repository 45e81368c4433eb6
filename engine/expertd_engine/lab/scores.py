"""What predictors would have said during a trace: what the next layers use, how soon an expert is used again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from expertd_engine.lab.events import Events
from expertd_engine.lab.predictor_file import Predictor, Recent
from expertd_engine.lab.trace import Trace
from expertd_engine.model.gates import Gate


def named_by(trace: Trace, gates: Sequence[Gate], leads: int = 4) -> NDArray[np.int16]:
    """`[rows, layers, leads, top_k]`: what the gates of the next layers choose, asked about each row's state."""
    assert trace.hidden is not None, "the trace has no hidden states"
    layers, top_k = len(gates), trace.header.top_k
    found = np.empty((len(trace), layers, leads, top_k), np.int16)
    for layer, gate in enumerate(gates):
        states = trace.hidden[:, layer].astype(np.float32)
        for lead in range(1, leads + 1):
            matrix, bias = gates[(layer + lead) % layers].seen_from(gate)
            found[:, layer, lead - 1] = np.argpartition(-(states @ matrix.T + bias), top_k - 1)[:, :top_k]
    return found


def scores_of(trace: Trace, events: Events, predictor: Predictor) -> NDArray[np.float32]:
    """`[events, E]`, after each event, of its layer's experts. The trace has hidden states."""
    assert trace.hidden is not None, "the trace has no hidden states"
    begins = np.flatnonzero(np.r_[True, trace.steps[1:] != trace.steps[:-1]])
    counted = trace.decode.copy()
    ends = np.r_[begins[1:], len(trace)]
    silent = ~np.logical_or.reduceat(trace.decode, begins)
    counted[ends[silent] - 1] = True  # of a prompt the last token matters to what comes after
    rows = np.flatnonzero(counted)
    first = np.searchsorted(rows, begins)
    found = np.empty((len(begins), events.layers, events.width), np.float32)
    for layer in range(events.layers):
        own = trace.hidden[rows, layer].astype(np.float32) @ predictor.keep[layer] + predictor.keep_bias[layer]
        found[:, layer] = np.maximum.reduceat(own, first)
        recent = Recent(predictor.half_lives, 1, events.width)
        for step, chosen in enumerate(np.split(trace.routes[rows, layer], first[1:])):
            recent.use(0, chosen.ravel())
            found[step, layer] += recent.features[0].T @ predictor.keep_recent[layer]
    return found.reshape(-1, events.width)
