"""The native kernels are right in every format and on every instruction set here, and always give the same bits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from expertd_engine.kernels import library
from expertd_engine.kernels.library import ACTIVATIONS, Pool
from golden.tolerances import KERNEL_ACTIVATIONS, KERNEL_EXPERTS, KERNEL_EXPERTS_WORST, KERNEL_SUMS
from support.kernels import (
    AVAILABLE,
    Doubles,
    Experts,
    Floats,
    Routes,
    as_read,
    every_format,
    instruction_sets,
    make_experts,
    make_routes,
    matmul,
    needs_kernels,
    normal,
    pack,
    pool_on,
    run_moe,
    run_partials,
    scratch_bytes,
)

pytestmark = needs_kernels

SHAPES = [(1, 1), (16, 32), (17, 33), (5, 96), (40, 7), (100, 300), (33, 1024)]
TOKENS = [1, 2, 3, 5, 8, 9, 31, 64, 257]
ALL_WAYS = [(name, threads) for name in AVAILABLE for threads in (1, 2, 3, 4)]


def _formula(kind: str, g: torch.Tensor, u: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Of gate and up, in the words of the header."""
    if kind == "swiglu_clamped":
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        return (u + 1) * g * torch.sigmoid(alpha * g)
    plain: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x) ** 2,
    }
    return plain[kind](g) * u


def _moe_in_float64(experts: Experts, x: Floats, routes: Routes, kind: str) -> Doubles:
    seen, out = as_read(x, experts.format), np.zeros(x.shape)
    layout = experts.layout
    for expert, tensors in enumerate(experts.tensors):
        pairs = slice(routes.begin[expert], routes.begin[expert + 1])
        rows = routes.row[pairs]

        def project(name: str, given: Doubles, tensors: dict[str, Floats] = tensors) -> torch.Tensor:
            bias = tensors.get(f"{name}_bias", np.zeros(1, np.float32))
            return torch.from_numpy(given @ tensors[name].astype(np.float64).T + bias)

        up = project("up", seen[rows])
        gate, up = (project("gate", seen[rows]), up) if "gate" in tensors else (up, torch.ones_like(up))
        inner = _formula(kind, gate, up, layout.alpha, layout.limit).numpy()
        if experts.format.startswith("int"):
            inner = as_read(inner.astype(np.float32), experts.format)
        out[rows] += routes.weight[pairs, None] * project("down", inner).numpy()
    return out


@every_format
@instruction_sets
@pytest.mark.parametrize("shape", SHAPES)
def test_products_against_float64(format: str, instruction_set: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape)
    packed, bias = pack(normal(rng, *shape), format), normal(rng, shape[0])
    with pool_on(instruction_set) as pool:
        for tokens in TOKENS:
            x = normal(rng, tokens, shape[1])
            y = matmul(pool, packed.matrix(bias), x)
            seen = as_read(x, format)
            exact = seen @ packed.values.astype(np.float64).T + bias
            magnitude = np.abs(seen) @ packed.magnitudes.T + np.abs(bias)
            assert (np.abs(y - exact) / magnitude).max() <= KERNEL_SUMS[format].allowed, tokens


@every_format
def test_a_row_has_the_same_bits_alone_in_a_batch_and_on_any_processor(format: str) -> None:
    rng = np.random.default_rng(7)
    packed, x = pack(normal(rng, 83, 210), format), normal(rng, 257, 210)
    expected = None
    for instruction_set, threads in ALL_WAYS:
        with pool_on(instruction_set, threads) as pool:
            everything = matmul(pool, packed.matrix(), x)
            expected = everything if expected is None else expected
            assert np.array_equal(everything, expected), (instruction_set, threads)
            for begin, end in [(0, 1), (256, 257), (3, 5), (8, 16), (100, 117), (11, 75)]:
                assert np.array_equal(matmul(pool, packed.matrix(), x[begin:end]), expected[begin:end])


@every_format
def test_rows_may_lie_apart(format: str) -> None:
    rng = np.random.default_rng(3)
    packed, x = pack(normal(rng, 20, 50), format), normal(rng, 6, 64)
    y = np.full((6, 30), 7, np.float32)
    with pool_on("") as pool:
        pool.matmul(packed.matrix(), x.ctypes.data, 6, y.ctypes.data, ldx=64, ldy=30)
        together = matmul(pool, packed.matrix(), np.ascontiguousarray(x[:, :50]))
    assert np.array_equal(y[:, :20], together) and (y[:, 20:] == 7).all()


@every_format
def test_rows_are_read_back(format: str) -> None:
    packed = pack(normal(np.random.default_rng(4), 37, 45), format)
    ids = np.array([36, 0, 17, 17], np.int64)
    out = np.empty((4, 45), np.float32)
    library.load().rows(packed.matrix(), ids.ctypes.data, 4, out.ctypes.data)
    assert np.array_equal(out, packed.values[ids])


@every_format
@instruction_sets
def test_what_is_not_finite_stays_so_in_its_own_row(format: str, instruction_set: str) -> None:
    packed = pack(normal(np.random.default_rng(5), 18, 64), format)
    x = np.ones((4, 64), np.float32)
    x[1, 40], x[2, 3], x[3] = np.nan, np.inf, 0
    with pool_on(instruction_set) as pool:
        y = matmul(pool, packed.matrix(), x)
    assert np.isfinite(y[0]).all() and not np.isfinite(y[1:3]).any() and (y[3] == 0).all()


@every_format
@pytest.mark.parametrize(
    ("activation", "gated"),
    [*((name, True) for name in ACTIVATIONS), *((name, False) for name in ACTIVATIONS if name != "swiglu_clamped")],
)
def test_experts_against_float64(format: str, activation: str, gated: bool) -> None:
    rng = np.random.default_rng(list(ACTIVATIONS).index(activation))
    experts = make_experts(rng, 5, 72, 100, format, activation, gated=gated)
    routes, x = make_routes(rng, 5, 29, 2), normal(rng, 29, 72)
    with pool_on("") as pool:
        out = run_moe(pool, experts, x, routes)
    exact = _moe_in_float64(experts, x, routes, activation)
    errors = np.abs(out - exact).max(axis=1) / np.abs(exact).max()
    if format.startswith("int"):
        assert np.median(errors) <= KERNEL_EXPERTS.allowed and errors.max() <= KERNEL_EXPERTS_WORST.allowed
    else:
        assert errors.max() <= KERNEL_EXPERTS.allowed


@every_format
@pytest.mark.parametrize("tokens", [1, 6, 70])
def test_experts_have_the_same_bits_on_any_processor(format: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    experts = make_experts(rng, 6, 48, 80, format, biases=False)
    routes, x = make_routes(rng, 6, tokens, 3), normal(rng, tokens, 48)
    expected = None
    for instruction_set, threads in ALL_WAYS:
        with pool_on(instruction_set, threads) as pool:
            out = run_moe(pool, experts, x, routes)
            expected = out if expected is None else expected
            assert np.array_equal(out, expected), (instruction_set, threads)


@every_format
def test_experts_of_a_token_are_summed_in_ascending_order_and_alike_in_parts(format: str) -> None:
    rng = np.random.default_rng(11)
    experts = make_experts(rng, 8, 48, 64, format)
    routes, x = make_routes(rng, 8, 40, 4), normal(rng, 40, 48)
    routes.weight[:] = routes.weight ** np.float32(-3)  # of very different size: another order would show
    with pool_on("") as pool:
        direct, partials = run_moe(pool, experts, x, routes), run_partials(pool, experts, x, routes)
    in_order = np.zeros_like(x)
    for pair, row in enumerate(routes.row):
        in_order[row] += partials[pair]
    assert np.array_equal(direct, in_order)


def test_a_token_of_a_large_prefill_has_the_bits_that_it_has_alone() -> None:
    """Enough pairs for several rounds over the inner activations: experts are split between them."""
    rng = np.random.default_rng(12)
    experts = make_experts(rng, 2, 32, 2048, "float32", biases=False)
    routes, x = make_routes(rng, 2, 1500, 2), normal(rng, 1500, 32)
    with pool_on("") as pool:
        everything = run_moe(pool, experts, x, routes)
        assert scratch_bytes(pool) < 16 << 20
        for token in (0, 777, 1499):
            chosen = np.flatnonzero(routes.row == token)
            one = Routes(np.array([0, 1, 2], np.int32), np.zeros(2, np.int32), routes.weight[chosen])
            assert np.array_equal(run_moe(pool, experts, x[token : token + 1], one)[0], everything[token])


def _activated(pool: Pool, kind: str, g: Floats) -> Floats:
    """activation(g, 1) value by value, through an expert whose matrices are the identity (adding zeros is exact)."""
    width, rng = g.shape[1], np.random.default_rng(0)
    experts = make_experts(rng, 1, width, width, "float32", kind)
    (record,), offsets = experts.records, experts.layout
    identity = np.eye(width, dtype=np.float32).tobytes()
    for offset, content in [
        *((offsets.gate, identity), (offsets.up, bytes(len(identity))), (offsets.down, identity)),
        *((offsets.gate_bias, bytes(4 * width)), (offsets.down_bias, bytes(4 * width))),
        (offsets.up_bias, np.ones(width, np.float32).tobytes()),
    ]:
        record[offset:][: len(content)] = np.frombuffer(content, np.uint8)
    tokens = len(g)
    everyone = np.arange(tokens, dtype=np.int32)
    routes = Routes(np.array([0, tokens], np.int32), everyone, np.ones(tokens, np.float32))
    return run_moe(pool, experts, g, routes)


@instruction_sets
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_against_torch(kind: str, instruction_set: str) -> None:
    values = np.concatenate([np.linspace(-12, 12, 6001), np.linspace(-100, 100, 397), np.geomspace(1e-30, 1, 2)])
    g = values.astype(np.float32).reshape(-1, 64)
    with pool_on(instruction_set) as pool:
        got = _activated(pool, kind, g)
    x = torch.from_numpy(g).double()
    exact = _formula(kind, x, torch.ones_like(x), 1.7, 1.0).numpy()
    error = np.abs(got - exact) / np.maximum(np.abs(exact), 1e-3)
    assert error.max() <= KERNEL_ACTIVATIONS[kind].allowed
