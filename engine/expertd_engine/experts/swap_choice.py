"""Who comes for whom as a step begins, chosen by native code by the rule of `VirtualExperts.bring`. Owns no set."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_double, c_int32, c_void_p
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.held_table import Bools, HeldTable
from expertd_engine.experts.virtual import VirtualExperts
from expertd_engine.kernels.library import Library

Floats: TypeAlias = NDArray[np.float32]

CANDIDATES = 3
"""Experts considered for each swap that a step may begin."""


def most_expected(expected: Floats, taken: Bools, most: int) -> list[ExpertId]:
    """Up to `most` experts of which most is `expected` `[L, E]`, and that are not `taken` `[L, E]`."""
    lacking = np.where(taken, 0, expected).ravel()
    best = (-lacking).argsort(kind="stable")[:most]
    return [ExpertId(*divmod(at, expected.shape[1])) for at in best[lacking[best] > 0].tolist()]


class _HeldSets(ctypes.Structure):
    """`expertd_held_sets`."""

    _fields_ = [
        ("layers", c_int32),
        ("experts", c_int32),
        *((name, c_void_p) for name in ("held", "taken", "scores")),
        ("least", c_int32),
        ("candidates", c_int32),
        ("factor", c_double),
    ]


class SwapChooser:
    """Asked while the sets are plain (`VirtualExperts.is_plain`)."""

    def __init__(self, library: Library, sets: VirtualExperts, table: HeldTable) -> None:
        # Microseconds, so the interpreter lock is kept: whoever lets go of it waits for whoever takes it.
        self._call = library.bind(
            "expertd_choose_swaps",
            [POINTER(_HeldSets), c_void_p, c_int32, c_void_p, c_void_p, POINTER(c_int32)],
            ctypes.PyDLL(None, handle=library.handle._handle),
        )
        self._sets, self._table = sets, table
        layers, self._width = table.held.shape
        given = table.told.ctypes.data, table.taken.ctypes.data, sets.scores.buffer_info()[0]
        candidates, factor = CANDIDATES * sets.limits.foreseen, 1 + sets.limits.hysteresis
        self._described = _HeldSets(layers, self._width, *given, sets.top_k, candidates, factor)
        self._newcomers, self._victims = np.zeros((2, max(1, sets.limits.foreseen)), np.int64)
        self._found = c_int32()
        self._results = self._newcomers.ctypes.data, self._victims.ctypes.data, byref(self._found)
        self._expected: Floats = np.zeros(0, np.float32)
        self._expected_at = 0
        """Addresses are kept: to tell one takes numpy up to ten microseconds."""

    def __call__(self, expected: Floats) -> list[tuple[ExpertId, ExpertId]]:
        """Newcomers, and who leaves for each, where these shares `[L, widest E]` of layers' weight are expected."""
        if expected is not self._expected:
            fits = expected.shape == self._table.held.shape and expected.flags.c_contiguous
            if not fits or expected.dtype != np.float32:
                raise ValueError(
                    f"{expected.dtype} {expected.shape} is not what sets of {self._table.held.shape} are told"
                )
            self._expected, self._expected_at = expected, expected.ctypes.data
        most = min(self._sets.may_begin, len(self._newcomers))  # limits may have changed since there was room made
        self._call(byref(self._described), self._expected_at, most, *self._results)
        found = self._found.value
        pairs = zip(self._newcomers[:found].tolist(), self._victims[:found].tolist(), strict=True)
        return [(self._expert(newcomer), self._expert(victim)) for newcomer, victim in pairs]

    def _expert(self, at: int) -> ExpertId:
        return ExpertId(*divmod(at, self._width))
