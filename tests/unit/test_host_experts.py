"""Experts that the processor computes for a device: records as GPUs read them, requests through shared memory, and
what fails there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from expertd_engine.errors import EngineError
from expertd_engine.experts.device_host_compute import HostCompute, Room
from expertd_engine.experts.device_streams import HostDevice
from expertd_engine.kernels import library
from expertd_engine.kernels.host_experts import HostLayer
from support.kernels import (
    Experts,
    Floats,
    every_format,
    instruction_sets,
    make_experts,
    make_routes,
    needs_kernels,
    normal,
    pool_on,
    run_moe,
)
from support.native_programs import run, sanitized

pytestmark = needs_kernels

EXPERTS, HIDDEN, INNER, TOP_K = 4, 100, 40, 2


def made(format: str, order: str, hidden: int = HIDDEN, inner: int = INNER) -> Experts:
    return make_experts(np.random.default_rng(3), EXPERTS, hidden, inner, format, order=order)


@contextmanager
def computing(*layers: Experts, absent: tuple[int, int] | None = None) -> Iterator[HostCompute]:
    """Two threads; of one (layer, expert) there may be no record."""
    addresses = [[record.ctypes.data for record in layer.records] for layer in layers]
    if absent is not None:
        addresses[absent[0]][absent[1]] = 0
    given = [HostLayer(layer.layout, addresses[nth], len(layer.records[0])) for nth, layer in enumerate(layers)]
    compute = HostCompute(library.load(), HostDevice(), given, Room(2, TOP_K, EXPERTS, HIDDEN), 2)
    try:
        yield compute
    finally:
        compute.close()


def answered(compute: HostCompute) -> Floats:
    """Of row 0; each sum has the last request's number beside it."""
    words = compute.sums.numpy()[0]
    assert set((words >> 32).tolist()) == {int(compute.posted)}
    sums: Floats = words.astype(np.uint32).view(np.float32)
    return sums


@instruction_sets
@every_format
@pytest.mark.parametrize("shape", [(HIDDEN, INNER), (32, 32), (17, 33), (96, 100)])
def test_records_in_either_order_give_the_same_bits(format: str, instruction_set: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    x, routes = normal(rng, 11, shape[0]), make_routes(rng, 11, EXPERTS, TOP_K)
    with pool_on(instruction_set) as pool:
        strips, rows = (run_moe(pool, made(format, order, *shape), x, routes) for order in ("strips", "rows"))
    assert np.array_equal(strips, rows) and np.any(strips)
    with pool_on(instruction_set, threads=1) as pool:  # more threads take smaller tasks
        assert np.array_equal(run_moe(pool, made(format, "rows", *shape), x, routes), rows)


def test_a_request_is_answered_with_weighted_sums() -> None:
    rng = np.random.default_rng(5)
    layers = made("int8", "rows"), made("bfloat16", "rows")
    x = normal(rng, 1, HIDDEN)
    with computing(*layers) as compute:
        compute.x.numpy()[:1] = x
        compute.weights.numpy()[0] = 0.75, -0.5
        compute.begin_step()
        answers = []
        for layer in range(2):
            compute.ask(layer, [1, 3])
            answers.append(answered(compute))
        assert compute.end_step() > 0
        assert (compute.computed, compute.computed_bytes) == (4, 2 * sum(len(one.records[0]) for one in layers))
    with pool_on("") as pool:
        for one, answer in zip(layers, answers, strict=True):
            expected = np.zeros((1, HIDDEN), np.float32)
            records = library.record_addresses([one.records[1].ctypes.data, one.records[3].ctypes.data])
            begin, row = np.array([0, 1, 2], np.int32), np.zeros(2, np.int32)
            weight = np.array([0.75, -0.5], np.float32)
            arrays = (begin.ctypes.data, row.ctypes.data, weight.ctypes.data)
            pool.moe(one.layout, x.ctypes.data, 1, records, *arrays, out=expected.ctypes.data)
            assert np.array_equal(answer, expected[0])


@instruction_sets
@every_format
def test_a_part_of_an_experts_neurons(format: str, instruction_set: str) -> None:
    """The bits of an expert whose other neurons, and the bias, give nothing; beside one that is whole."""
    inner, cut = 197, 128
    whole, rest = (
        make_experts(np.random.default_rng(3), EXPERTS, HIDDEN, inner, format, order="rows", cut=none)
        for none in (0, cut)
    )
    rest.records[1][:] = whole.records[1]
    nbytes, answers = len(whole.records[0]), []
    with pool_on(instruction_set), computing(whole, rest) as compute:
        compute.x.numpy()[:1] = normal(np.random.default_rng(5), 1, HIDDEN)
        compute.weights.numpy()[0] = 0.75, -0.5
        for layer, cuts in enumerate(([0, cut], [0, 0])):
            compute.begin_step()
            compute.ask(layer, [1, 3], cuts)
            compute.end_step()
            answers.append(answered(compute))
    assert np.array_equal(answers[0], answers[1]) and np.any(answers[0])
    assert compute.computed_bytes == 3 * nbytes + nbytes * (inner - cut) // inner


@pytest.mark.parametrize("cut", [40, 64, -64])
def test_a_part_that_there_is_not_ends_the_step(cut: int) -> None:
    with computing(made("int4", "rows")) as compute:
        compute.begin_step()
        compute.ask(0, [1], [cut])
        with pytest.raises(EngineError, match=rf"cuts\[0\] is {cut}; allowed are multiples of 64 below {INNER}"):
            compute.end_step()


@pytest.mark.parametrize(
    ("layer", "expert", "told"),
    [(0, 2, "expert 2 of layer 0 has no record"), (0, 4, "expert 4 of layer 0 has no"), (1, 0, "layer 1 is asked for")],
)
def test_what_cannot_be_computed_is_answered_and_ends_the_step(layer: int, expert: int, told: str) -> None:
    with computing(made("float32", "rows"), absent=(0, 2)) as compute:
        compute.begin_step()
        compute.ask(layer, [expert])
        with pytest.raises(EngineError, match=f"the processor could not compute .*{told}"):
            compute.end_step()
        compute.begin_step()
        compute.ask(0, [1])
        assert compute.end_step() > 0 and compute.computed == 1


def test_requests_of_a_step_behind_another_are_looked_for_without_a_pause() -> None:
    with computing(made("float32", "rows"), absent=(0, 2)) as compute:
        compute.begin_step()
        compute.begin_step()
        compute.ask(0, [1])
        assert compute.end_step() > 0 and compute.computed == 1
        compute.ask(0, [3])
        compute.begin_step()
        compute.ask(0, [2])
        with pytest.raises(EngineError, match="expert 2 of layer 0 has no record"):
            compute.end_step()
        assert compute.computed == 1, "told with the next"
        compute.give_up()
        assert compute.computed == 2
        compute.give_up()
        assert compute.end_step() == 0.0


@pytest.mark.slow
def test_no_two_threads_meet_where_they_should_not() -> None:
    assert "checks on" in run(sanitized("host_check", "thread"))


def test_what_is_measured_is_not_counted() -> None:
    with computing(made("float32", "rows"), made("float32", "rows")) as compute:
        beside: list[int] = []
        bytes_per_s, start_s = compute.measure(beside.append)
        assert bytes_per_s > 0 and start_s >= 0 and min(beside) > 0
        compute.begin_step()
        compute.ask(1, [0])
        compute.end_step()
        assert compute.computed == 1
