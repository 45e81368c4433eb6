"""The C interface of one decoder layer (`kernels/native/expertd_block.h`) in ctypes. Owns no memory.

Structures hold addresses; whoever fills one keeps what lies behind them alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Any

from expertd_engine.kernels.library import ExpertsCall, KernelsMissing, Library, Matrix


class NormKind(IntEnum):
    NONE = 0
    RMS = 1
    LAYER = 2


class Rope(IntEnum):
    """Which dimensions are rotated together: i and i + half, or 2i and 2i + 1."""

    NONE = 0
    HALVES = 1
    PAIRS = 2


class Scores(IntEnum):
    """How router logits become scores. LOGITS: who calls selects. GIVEN: who calls has done so before."""

    DENSE = 0
    LOGITS = 1
    SOFTMAX = 2
    SIGMOID = 3
    CHOSEN = 4
    GIVEN = 5


class Norm(ctypes.Structure):
    """`expertd_norm`."""

    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("kind", c_int32),
        ("length", c_int32),
        ("eps", c_float),
    ]


class Router(ctypes.Structure):
    """`expertd_router`. Of equal scores the lower expert id comes first (`torch.topk` promises no order)."""

    _fields_ = [
        ("matrix", Matrix),
        ("bias", c_void_p),
        *((name, c_int32) for name in ("experts", "top_k", "scores", "groups", "groups_kept", "group_best", "shares")),
        ("epsilon", c_float),
        ("scale", c_float),
    ]


class FeedForward(ctypes.Structure):
    """`expertd_ffn`."""

    _fields_ = [
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("activation", c_int32),
        ("alpha", c_float),
        ("limit", c_float),
    ]


class Block(ctypes.Structure):
    """`expertd_block`: one decoder layer."""

    _fields_ = [
        *((name, Norm) for name in ("input_norm", "attention_norm", "ffn_norm", "output_norm")),
        *((name, Norm) for name in ("query_norm", "key_norm")),
        *((name, Matrix) for name in ("query", "key", "value", "output", "attention_gate", "ffn_gate")),
        ("router", Router),
        ("ffn", FeedForward),
        *((name, c_void_p) for name in ("cos", "sin", "sinks")),
        *((name, c_int64) for name in ("positions", "key_offset", "value_offset", "window")),
        *((name, c_int32) for name in ("hidden", "heads", "kv_heads", "key_dim", "value_dim")),
        *((name, c_int32) for name in ("rope", "rotary_dim", "norm_after_rope", "parallel")),
        *((name, c_float) for name in ("clip", "scale", "attention_residual", "ffn_residual")),
    ]


class Step(ctypes.Structure):
    """`expertd_step`: one step's tokens and activations."""

    _fields_ = [
        ("rows", c_int64),
        ("positions", c_void_p),
        ("spans", c_int64),
        *((name, c_void_p) for name in ("span_row", "span_table", "tables", "blocks")),
        ("block_stride", c_int64),
        ("block_tokens", c_int32),
        ("kv_format", c_int32),
        *((name, c_void_p) for name in ("hidden", "normed", "added", "logits", "experts", "weights")),
    ]


class Run(ctypes.Structure):
    """`expertd_run`: all layers, and where their experts lie."""

    _fields_ = [
        ("layers", c_int32),
        *((name, c_void_p) for name in ("blocks", "layouts", "slots", "slot_zero")),
        ("slot_stride", c_int64),
        *((name, c_void_p) for name in ("routed", "chosen")),
        ("chosen_stride", c_int64),
        ("given", c_void_p),
    ]


class Substitution(ctypes.Structure):
    """`expertd_substitution`: one layer's rows among the experts that it holds."""

    _fields_ = [
        *((name, c_void_p) for name in ("held", "limits")),
        ("shared_by", c_int32),
        *((name, c_void_p) for name in ("experts", "weights", "counts", "replaced", "mass")),
    ]


class LayerTally(ctypes.Structure):
    """`expertd_tally`: what one layer of a run among held experts is for the books."""

    _fields_ = [(name, c_void_p) for name in ("norms", "scores", "choices", "replaced", "mass")]


class HeldRun(ctypes.Structure):
    """`expertd_held_run`: what a run among held experts leaves."""

    _fields_ = [
        *((name, c_void_p) for name in ("layers", "tallies")),
        ("unit", c_double),
        *((name, c_void_p) for name in ("weights", "lengths")),
        ("lengths_stride", c_int64),
        *((name, c_void_p) for name in ("served", "row_replaced", "row_mass")),
    ]


class BlockCalls:
    """The functions of `expertd_block.h`. Each raises ValueError for refused arguments, KernelError otherwise.

    Raises KernelsMissing for a library built of another version of that header.
    """

    def __init__(self, library: Library) -> None:
        for structure, name in ((Block, "expertd_block_bytes"), (Step, "expertd_step_bytes")):
            size: Any = getattr(library.handle, name, lambda: None)  # absent from older libraries
            size.restype = c_int64
            if size() != ctypes.sizeof(structure):
                raise KernelsMissing(f"native kernels {library.path} are of another version: install again")
        block, step, address, experts = POINTER(Block), POINTER(Step), c_void_p, POINTER(ExpertsCall)
        self.forward: Callable[..., None] = library.bind(
            "expertd_block_forward", [address, block, block, experts, address, step]
        )
        self.finish: Callable[..., None] = library.bind(
            "expertd_block_finish", [address, block, experts, address, step]
        )
        self.run: Callable[..., None] = library.bind(
            "expertd_run_forward", [address, POINTER(Run), c_int32, experts, step, POINTER(c_int32)]
        )
        self.run_held: Callable[..., None] = library.bind(
            "expertd_run_held",
            [address, POINTER(Run), POINTER(HeldRun), c_int32, experts, step, POINTER(c_int32)],
        )
        self.substitute: Callable[..., None] = library.bind(
            "expertd_substitute",
            [address, POINTER(Router), POINTER(Substitution), c_int64, address, address, address],
        )
        self.logits: Callable[..., None] = library.bind(
            "expertd_block_logits",
            [address, POINTER(Norm), POINTER(Matrix), c_float, address, c_int64, address, c_int64, address],
        )
