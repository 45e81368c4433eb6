"""One decoder layer in native code: right, the same bits everywhere, and clear about what it refuses.

`tests/native/block_check.cpp` compares layers of many shapes with double precision and with themselves: on every
instruction set, with several threads, in steps of any length, beside other sequences.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from ctypes import byref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from expertd_engine.kernels.library import KernelsMissing, Matrix, Pool
from expertd_engine.model.native_abi import Block, BlockCalls, Norm, NormKind, Rope, Router, Scores, Step
from support.kernels import needs_kernels, pool_on
from support.native_programs import SANITIZERS, build, emulated, needs, run, sanitized

HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS, TOP_K, BLOCK_TOKENS = 32, 4, 2, 16, 8, 2, 16
POSITIONS = 64


@pytest.fixture(scope="module")
def said_here() -> str:
    return run(build("block_check"))


def test_layers_are_right_and_their_bits_the_same(said_here: str) -> None:
    assert "checks on" in said_here


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer: str) -> None:
    assert "checks on" in run(sanitized("block_check", sanitizer))


@pytest.mark.slow
def test_neon_gives_the_bits_that_this_processor_gives(said_here: str) -> None:
    needs("qemu-aarch64")  # Debian: qemu-user, g++-aarch64-linux-gnu
    said = emulated(build("block_check", "aarch64-linux-gnu-g++", "-static"))
    assert "on neon portable" in said
    assert said.splitlines()[-1] == said_here.splitlines()[-1]


class Layer:
    """A small layer of random weights and a step of four tokens, to be spoilt by tests."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._keep: list[Any] = []
        block = self.block = Block()
        block.input_norm = block.ffn_norm = Norm(self.floats(HIDDEN), None, NormKind.RMS, HIDDEN, 1e-5)
        block.query, block.output = self.matrix(HEADS * DIM, HIDDEN), self.matrix(HIDDEN, HEADS * DIM)
        block.key, block.value = self.matrix(KV_HEADS * DIM, HIDDEN), self.matrix(KV_HEADS * DIM, HIDDEN)
        block.router = Router(
            matrix=self.matrix(EXPERTS, HIDDEN), experts=EXPERTS, top_k=TOP_K, scores=Scores.SOFTMAX, scale=1.0
        )
        block.rope, block.rotary_dim, block.positions = Rope.HALVES, DIM, POSITIONS
        block.cos = block.sin = self.floats(POSITIONS * DIM // 2)
        block.hidden, block.heads, block.kv_heads = HIDDEN, HEADS, KV_HEADS
        block.key_dim = block.value_dim = DIM
        block.scale, block.attention_residual, block.ffn_residual = 0.25, 1.0, 1.0
        block.value_offset = BLOCK_TOKENS * KV_HEADS * DIM * 4
        self.positions = self.array([0, 1, 2, 3], np.int64)
        self.step = Step(4, self.positions.ctypes.data, 1)
        self.step.span_row = self.array([0, 4], np.int64).ctypes.data
        self.step.span_table = self.array([0], np.int64).ctypes.data
        self.step.tables = self.array([1], np.int32).ctypes.data
        self.step.blocks = self.array(np.zeros(2 * 2 * block.value_offset), np.uint8).ctypes.data
        self.step.block_stride, self.step.block_tokens = 2 * block.value_offset, BLOCK_TOKENS
        for name in ("hidden", "normed", "added"):
            setattr(self.step, name, self.floats(4 * HIDDEN))
        self.step.logits, self.step.weights = self.floats(4 * EXPERTS), self.floats(4 * TOP_K)
        self.experts = self.array(np.full(4 * TOP_K, -1), np.int64)
        self.step.experts = self.experts.ctypes.data

    def array(self, values: Any, dtype: Any) -> Any:
        self._keep.append(np.asarray(values).astype(dtype))
        return self._keep[-1]

    def floats(self, count: int) -> int:
        return int(self.array(self._rng.standard_normal(count), np.float32).ctypes.data)

    def matrix(self, rows: int, cols: int) -> Matrix:
        return Matrix(self.floats(rows * cols), None, 0, rows, cols)

    def forward(self, pool: Pool) -> None:
        BlockCalls(pool.library).forward(pool.address, byref(self.block), None, None, None, byref(self.step))


def _put(path: str, value: Any) -> Callable[[Layer], None]:
    """Assigns to `step.…` or `block.…` of a layer."""
    *parents, name = path.split(".")

    def spoil(layer: Layer) -> None:
        setattr(functools.reduce(getattr, parents, layer), name, value)

    return spoil


SPOILT: dict[str, Callable[[Layer], None]] = {
    "block_tokens is 8; allowed are multiples of 16": _put("step.block_tokens", 8),
    "kv_format is 2; allowed are 0 and 1": _put("step.kv_format", 2),
    "the spans are not the step's rows": _put("step.rows", 3),
    "position 64 is not in the table of 64": lambda layer: layer.positions.put(3, 64),
    "position -1 is not in the table of 64": lambda layer: layer.positions.put(0, -1),
    "4 query heads cannot share 3 key heads": _put("block.kv_heads", 3),
    "key is 32 x 32; it must be 16 x 32": _put("block.kv_heads", 1),
    "query is 64 x 32; it must be 64 x 31": _put("block.hidden", 31),
    "value.data is null": _put("block.value.data", None),
    "value.format is 9; allowed are 0 to 4": _put("block.value.format", 9),
    "a norm is of 30 numbers; it must be of 32": _put("block.ffn_norm.length", 30),
    "key_norm is of 24 numbers; it must fit 32": _put("block.key_norm", Norm(1, None, NormKind.RMS, 24, 1e-5)),
    "rotary_dim is 18; allowed are even numbers": _put("block.rotary_dim", 18),
    "top_k is 9; allowed are 1 to 8": _put("block.router.top_k", 9),
    "3 groups, 0 of them kept, do not fit 8 experts": _put("block.router.groups", 3),
}


@needs_kernels
def test_a_layer_runs() -> None:
    layer = Layer()
    with pool_on("") as pool:
        layer.forward(pool)
    chosen = layer.experts.reshape(4, TOP_K)
    assert ((chosen >= 0) & (chosen < EXPERTS)).all() and (chosen[:, 0] != chosen[:, 1]).all()


@needs_kernels
@pytest.mark.parametrize("text", SPOILT)
def test_what_cannot_be_is_refused(text: str) -> None:
    layer = Layer()
    SPOILT[text](layer)
    with pool_on("") as pool, pytest.raises(ValueError, match=re.escape(text)):
        layer.forward(pool)


@needs_kernels
def test_experts_of_a_row_without_numbers_are_still_experts() -> None:
    """A model that overflows gives NaN: the answer is worthless, but no memory beyond the experts is read."""
    layer = Layer()
    layer.block.router.matrix = Matrix(
        layer.array(np.full(EXPERTS * HIDDEN, np.nan), np.float32).ctypes.data, None, 0, 8, 32
    )
    with pool_on("") as pool:
        layer.forward(pool)
    assert layer.experts.reshape(4, TOP_K).tolist() == [[0, 1]] * 4


@needs_kernels
def test_equal_scores_go_to_the_lower_id() -> None:
    layer = Layer()
    layer.block.router.matrix = Matrix(layer.array(np.zeros(EXPERTS * HIDDEN), np.float32).ctypes.data, None, 0, 8, 32)
    with pool_on("") as pool:
        layer.forward(pool)
    assert layer.experts.reshape(4, TOP_K).tolist() == [[0, 1]] * 4


@needs_kernels
def test_a_logit_row_outside_the_step_is_refused() -> None:
    layer = Layer()
    rows, out = np.array([4], np.int64), np.zeros(EXPERTS, np.float32)
    with pool_on("") as pool, pytest.raises(ValueError, match="logit row 4 is not one of 4"):
        BlockCalls(pool.library).logits(
            *(pool.address, byref(layer.block.ffn_norm), byref(layer.block.router.matrix), 1.0),
            *(layer.step.hidden, 4, rows.ctypes.data, 1, out.ctypes.data),
        )


@pytest.mark.parametrize("functions", [{}, {"expertd_block_bytes": lambda: 8}])
def test_a_library_of_another_version_is_not_called(functions: dict[str, Any]) -> None:
    library: Any = SimpleNamespace(handle=SimpleNamespace(**functions), path="old.so")
    with pytest.raises(KernelsMissing, match="another version: install again"):
        BlockCalls(library)
