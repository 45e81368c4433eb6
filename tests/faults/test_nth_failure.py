"""The n-th read or allocation fails, for every n: once, then from there on. Whoever was not touched says what it would
have said; what was touched ends with an error; afterwards everything balances and the next request is right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import count, islice

import pytest

from simulation.world import World

Plant = Callable[[World, range], None]


def fail_reads(world: World, numbers: range) -> None:
    world.faults.failing = numbers


def fail_allocations(world: World, numbers: range) -> None:
    world.failing_allocations = numbers


def quiet_world(seed: int) -> World:
    world = World(seed)
    world.calm = True
    world.faults.clear()
    world.step_faults = world.kills = 0.0
    return world


def ends(world: World) -> dict[int, str | None]:
    return {sequence_id: request.ended for sequence_id, request in world.requests.ended.items()}


def run_with(seed: int, plant: Plant, numbers: range) -> World:
    """The world's requests with the fault, then one more without."""
    world = quiet_world(seed)
    plant(world, numbers)
    world.run()
    plant(world, range(0))
    world.arrivals = [(world.step, 99)]
    world.run()
    assert ends(world)[99] in ("stop", "length"), "the request after the fault"
    return world


def count_of(seed: int, plant: Plant) -> int:
    world = quiet_world(seed)
    world.run()
    assert set(ends(world).values()) <= {"stop", "length"}
    return world.disk.reads if plant is fail_reads else world.allocations


@cache
def seed_of(world: int) -> int:
    """The n-th world that reads a good deal, for several requests, and not for ever."""
    fit = (s for s in count(0) if 40 < count_of(s, fail_reads) < 110 and len(quiet_world(s).arrivals) > 1)
    return next(islice(fit, world, None))


@pytest.mark.parametrize("plant", [fail_reads, fail_allocations])
@pytest.mark.parametrize("world", range(3))
def test_one_failure_costs_nobody_an_answer(plant: Plant, world: int) -> None:
    """It is tried again: a demanded read by the ledger, the step by the scheduler."""
    seed = seed_of(world)
    total = count_of(seed, plant)
    assert total > 20
    for number in range(total):
        ran = run_with(seed, plant, range(number, number + 1))
        assert set(ends(ran).values()) <= {"stop", "length"}, f"{number} of {total}, seed {seed}"


@pytest.mark.parametrize("plant", [fail_reads, fail_allocations])
@pytest.mark.parametrize("world", range(3))
def test_failures_without_end_end_the_requests_that_meet_them_and_no_others(plant: Plant, world: int) -> None:
    seed, reasons = seed_of(world), set()
    for number in range(0, count_of(seed, plant), 3):
        reasons |= set(ends(run_with(seed, plant, range(number, 10**9))).values())
    assert reasons == {"stop", "length", "error"} or reasons == {"length", "error"}


@pytest.mark.parametrize("length", [2, 3, 5, 9])
def test_a_run_of_failures_ends_at_most_those_in_its_steps(length: int) -> None:
    seed = seed_of(0)
    for number in range(0, count_of(seed, fail_reads), 5):
        ended = list(ends(run_with(seed, fail_reads, range(number, number + length))).values())
        assert ended.count("error") <= 1 < len(ended), f"{length} failures from {number} on, seed {seed}"
